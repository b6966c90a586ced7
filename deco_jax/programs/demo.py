"""--mode=demo: a page on 127.0.0.1 that draws images from a checkpoint and shows how they emerge from the noise.

    the page's fields ─ Request ─ Model.stream ─ a snapshot per step ─ progress, preview; then images and an animation

The page uses Gradio, an optional package. Nothing leaves this machine: no analytics, no shared link, no external fonts
or scripts.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
import pathlib
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from deco_jax import api, images
from deco_jax.data import sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.sampling.samplers import SAMPLERS

HOST = "127.0.0.1"
MAX_IMAGES = 16
MAX_FRAMES = 40  # in an animation
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.1, 2.0
OUT_OF_MEMORY = "the device is out of memory; draw fewer images, or smaller ones"
PREVIEW_SECONDS = 0.2  # between two previews
SMALLEST_SHOWN = 256  # pixels; smaller images are enlarged


@dataclasses.dataclass(frozen=True)
class Request:
    """The page's fields; `label` is for class-to-image models, the prompts are for text-to-image models."""

    height: int
    width: int
    count: int
    num_steps: int
    sampler: str
    guidance: float
    shift: float
    seed: int
    label: int = 0
    prompt: str = ""
    negative_prompt: str = ""


def demo(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "", port: int = 7860) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: Gradio isn't installed, the port is taken, or the checkpoint or text encoder can't be read.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=demo runs in one process; start it on one host, without --coordinator or a scheduler")
    gradio = import_gradio()
    port = free_port(port)
    model = api.open_model(config, workdir, checkpoint_path)
    print(f"{config.model.name} from {model.name}; the first image of each size waits for compilation", flush=True)
    with tempfile.TemporaryDirectory(prefix="deco_jax_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(gradio, model)
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Base(font=FONT, font_mono=FONT_MONO),
        )
        print(f"the demo is at http://{HOST}:{port}; press Ctrl-C to stop it", flush=True)
        # Both signals, because a program that a shell starts in the background ignores Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended", flush=True)
        finally:
            page.close(verbose=False)


def import_gradio() -> Any:
    """Import Gradio; raise UserError with the command that installs it if it is missing."""
    # Gradio reads this when it is imported.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
    except ImportError as error:
        raise UserError('the demo page needs Gradio; run: pip install "gradio>=6"') from error
    return gradio


def free_port(port: int) -> int:
    """Return `port`, or any free one if it is 0; raise UserError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port={port} is not available on {HOST} ({error.strerror}); give another, or 0 for any free one"
            ) from error
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------- drawing


def draw(model: api.Model, request: Request) -> Iterator[api.Snapshot]:
    """Yield the noise, then a snapshot after each step; raise UserError for an invalid request."""
    if not 1 <= request.count <= MAX_IMAGES:
        raise UserError(f"the page can't show {request.count} images at once; ask for 1 to {MAX_IMAGES}")
    if request.seed >= 2**31:
        raise UserError(f"the seed {request.seed} is too large; choose one below {2**31:,}")
    settings: api.Settings = {
        "num_steps": request.num_steps,
        "sampler": request.sampler,
        "guidance": request.guidance,
        "shift": request.shift,
        "seed": request.seed,
        "size": (request.height, request.width),
    }
    if model.num_classes:
        return model.stream(classes=[request.label] * request.count, **settings)
    settings["negative_prompt"] = request.negative_prompt
    return model.stream(prompts=[request.prompt] * request.count, **settings)


def class_names(model: api.Model) -> list[str] | None:
    """Return the class names that the run stored, or else those of its data; None if neither is available."""
    if model.class_names is not None:
        return model.class_names
    try:
        names = sources.open_source(model.config.data).class_names
    except UserError:
        return None
    return names if len(names) == model.num_classes else None


# ---------------------------------------------------------------------------------------- pictures


def shown(batch: np.ndarray) -> np.ndarray:
    """Enlarge small images, uint8 [count, height, width, 3], by a whole factor."""
    factor = max(1, SMALLEST_SHOWN // max(batch.shape[1:3]))
    return batch.repeat(factor, axis=1).repeat(factor, axis=2)


def animation(states: Sequence[np.ndarray]) -> bytes:
    """Return a trajectory's states [count, height, width, 3] as an animated WebP of grids; the last stays longer."""
    places = np.unique(np.linspace(0, len(states) - 1, min(MAX_FRAMES, len(states))).round().astype(int))
    frames = [Image.fromarray(images.grid(shown(states[i]))) for i in places]
    milliseconds = [round(1000 * FRAME_SECONDS)] * (len(frames) - 1) + [round(1000 * LAST_FRAME_SECONDS)]
    data = io.BytesIO()
    frames[0].save(
        data,
        format="webp",
        save_all=True,
        append_images=frames[1:],
        duration=milliseconds,
        loop=0,
        quality=85,
        method=2,
    )
    return data.getvalue()


def figure(data: bytes, kind: str, caption: str) -> str:
    """Return HTML of a picture with embedded data."""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style, text = "max-width: 100%; max-height: 70vh; border-radius: 8px", html.escape(caption)
    image = f'<img src="{uri}" alt="{text}" style="{style}">'
    return f'<figure style="margin: 0">{image}<figcaption>{text}</figcaption></figure>'


def preview(batch: np.ndarray, caption: str) -> str:
    """Return HTML of the images in their current state."""
    data = io.BytesIO()
    Image.fromarray(images.grid(shown(batch))).save(data, format="webp", quality=75, method=0)
    return figure(data.getvalue(), "webp", caption)


# ---------------------------------------------------------------------------------------- the page

# System fonts; Gradio's own would be files that it has to serve.
FONT = ("system-ui", "sans-serif")
FONT_MONO = ("ui-monospace", "monospace")


def make_page(gradio: Any, model: api.Model) -> Any:
    """Build the page: fields on the left, images on the right."""
    config, sample = model.config, model.config.sample
    height, width = model.image_size
    names = class_names(model) if model.num_classes else None
    patch, where = config.model.patch_size, pathlib.Path(model.name)
    title = f"deco_jax: {where.parent.parent.name or config.model.name}, step {where.name}"

    def side(label: str, value: int) -> Any:
        return gradio.Slider(patch * -(-8 // patch), 4 * value, value=value, step=patch, label=label)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {html.escape(title)}\n{html.escape(describe(config))}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                asked: dict[str, Any] = {}
                if not model.num_classes:
                    asked["prompt"] = gradio.Textbox(label="Prompt", lines=2)
                    asked["negative_prompt"] = gradio.Textbox(label="Negative prompt", value=sample.negative_prompt)
                elif names is not None:
                    asked["label"] = gradio.Dropdown(names, value=names[0], type="index", label="Class")
                else:
                    top = model.num_classes - 1
                    asked["label"] = gradio.Number(0, label=f"Class, 0 to {top}", precision=0)
                asked["count"] = gradio.Slider(1, MAX_IMAGES, value=min(4, sample.num_images), step=1, label="Images")
                asked["num_steps"] = gradio.Slider(
                    1, max(250, sample.num_steps), value=sample.num_steps, step=1, label="Steps"
                )
                asked["guidance"] = gradio.Slider(
                    0, max(10, sample.guidance), value=sample.guidance, step=0.1, label="Guidance (1: none)"
                )
                asked["seed"] = gradio.Number(sample.seed, label="Seed", precision=0)
                with gradio.Accordion("Sampler and size", open=False):
                    samplers = [name for name in SAMPLERS if model.config.model.mean_velocity or name != "mean_flow"]
                    asked["sampler"] = gradio.Dropdown(samplers, value=sample.sampler, label="Sampler")
                    asked["shift"] = gradio.Slider(
                        0.1,
                        max(10, sample.shift),
                        value=sample.shift,
                        step=0.1,
                        label="Time shift (higher: more steps near the noise)",
                    )
                    asked["height"], asked["width"] = side("Height", height), side("Width", width)
                with gradio.Row():
                    start = gradio.Button("Draw", variant="primary")
                    stop = gradio.Button("Stop")
            with gradio.Column(scale=2, min_width=320):
                gallery = gradio.Gallery(
                    label="Images",
                    show_label=False,
                    format="png",
                    columns=3,
                    object_fit="contain",
                    height="max-content",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="images",
                )
                view = gradio.HTML(elem_id="trajectory")

        def run(values: dict[Any, Any], progress: Any = gradio.Progress()) -> Iterator[Any]:  # noqa: B008
            try:
                yield from fulfil(model, read_request({name: values[field] for name, field in asked.items()}), progress)
            except UserError as error:
                raise gradio.Error(str(error), print_exception=False) from error
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise gradio.Error(OUT_OF_MEMORY, print_exception=False) from error

        events = [start.click] + ([asked["prompt"].submit] if "prompt" in asked else [])
        drawing = gradio.on(
            events,
            run,
            inputs=set(asked.values()),
            outputs=[gallery, view],
            show_progress_on=[gallery],
            api_visibility="private",
            concurrency_limit=1,
        )
        stop.click(None, cancels=[drawing], api_visibility="private")
    return page


def describe(config: ml_collections.ConfigDict) -> str:
    """Describe the model in a line."""
    model, (height, width) = config.model, image_sides(config.data.image_size)
    kind = "text to image" if model.text_width else f"{model.num_classes} classes"
    return f"{model.name}, {kind}, trained at {height}×{width}: width {model.width}, {model.depth} blocks."


def read_request(values: dict[str, Any]) -> Request:
    """Read the page's fields; raise UserError for one that is empty or not a number."""
    kinds = {"int": int, "float": float, "str": str}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Request):
        if field.name not in values:
            continue
        try:
            found[field.name] = kinds[str(field.type)](values[field.name])
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{field.name.replace('_', ' ')}: {values[field.name]!r} is not valid; fill it in"
            ) from None
    return Request(**found)


def fulfil(model: api.Model, request: Request, progress: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what the page shows, from the noise to the images, as (gallery, view)."""
    states: list[np.ndarray] = []
    began = spoke = time.monotonic()
    first = 0.0
    progress((0, request.num_steps), desc="compiling, if this size is new", unit="steps")
    for snapshot in draw(model, request):
        states.append(snapshot.images)
        step = snapshot.step
        if step:
            first = first or time.monotonic() - began
            progress((step, request.num_steps), desc="drawing", unit="steps")
        if step < snapshot.num_steps and (not step or time.monotonic() - spoke > PREVIEW_SECONDS):
            spoke = time.monotonic()
            yield [], preview(snapshot.images, f"step {step} of {request.num_steps}")
    took = time.monotonic() - began
    caption = (
        f"From noise to image in {request.num_steps} steps of {request.sampler}, guidance {request.guidance:g}, "
        f"shift {request.shift:g}, seed {request.seed}: {took:.1f} s, "
        f"{first:.1f} s of that until the first step was done"
    )
    pictures = [Image.fromarray(image) for image in shown(states[-1])]
    yield pictures, figure(animation(states), "webp", caption)
