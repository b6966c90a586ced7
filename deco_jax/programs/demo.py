"""--mode=demo: a page on 127.0.0.1 to draw images from a checkpoint and see them come out of the noise.

    the page's fields ─ Wish ─ Studio.draw ─ a look a step ─ progress, preview; at the end images and an animation

The page is Gradio's, an optional package. Nothing leaves this machine: no analytics, no shared link, no fonts or
scripts from elsewhere.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
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

from deco_jax import config as config_lib
from deco_jax import images
from deco_jax.conditioning.condition import open_condition
from deco_jax.conditioning.requests import Requests
from deco_jax.conditioning.texts import Texts
from deco_jax.data import sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.method.predictions import make_prediction
from deco_jax.models import network as network_lib
from deco_jax.run import checkpoint, sharding
from deco_jax.sampling import generate
from deco_jax.sampling.samplers import SAMPLERS

HOST = "127.0.0.1"
MAX_IMAGES = 16
MAX_FRAMES = 40  # of an animation
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.1, 2.0
PREVIEW_SECONDS = 0.2  # between two previews
SMALLEST_SHOWN = 256  # pixels; smaller images are enlarged


@dataclasses.dataclass(frozen=True)
class Wish:
    """What one request asks for; `label` is of class-to-image, the prompts are of text-to-image models."""

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
    studio = Studio(config, workdir, checkpoint_path)
    print(f"{config.model.name} from {studio.where}; the first image of a size takes compiling", flush=True)
    with tempfile.TemporaryDirectory(prefix="deco_jax_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(gradio, studio)
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
        print(f"the demo is at http://{HOST}:{port}; Ctrl-C ends it", flush=True)
        # Both: a shell that starts a program in the background has it ignore Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended", flush=True)
        finally:
            page.close(verbose=False)


def import_gradio() -> Any:
    """The package. UserError with the command that installs it."""
    # Read when it is imported.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
    except ImportError as error:
        raise UserError('the demo page needs Gradio; run: pip install "gradio>=6"') from error
    return gradio


def free_port(port: int) -> int:
    """`port`, or any that is free if it is 0. UserError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port={port} can't be had on {HOST} ({error.strerror}); give another, or 0 for any that is free"
            ) from error
        return probe.getsockname()[1]


# ---------------------------------------------------------------------------------------- drawing


class Studio:
    """A checkpoint's EMA weights, and the text encoder if the model has one, ready to draw."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
        self.config = config
        self.where = checkpoint.find(workdir, checkpoint_path, config)
        self._mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        self._condition = open_condition(config, self._mesh, None)
        network = network_lib.build(config.model.to_dict())
        self._params = checkpoint.load_average(self.where, network.shapes, config, self._mesh)
        self._encoder = self._condition.load_encoder() if isinstance(self._condition, Texts) else None
        self._watcher = generate.Watcher(network, make_prediction(config).in_sampling(), self._mesh)

    def draw(self, wish: Wish) -> Iterator[generate.Look]:
        """The noise, then a look after each evaluation. UserError for a wish that can't be fulfilled."""
        config = self.settings(wish)
        yield from self._watcher(self._params, self._requests(wish), config.sample, (wish.height, wish.width))

    def settings(self, wish: Wish) -> ml_collections.ConfigDict:
        """The config that would draw the same by --mode=sample, checked."""
        values = self.config.to_dict()
        values["data"]["image_size"] = (wish.height, wish.width)
        values["sample"] |= {
            "num_steps": wish.num_steps,
            "sampler": wish.sampler,
            "guidance": wish.guidance,
            "shift": wish.shift,
            "seed": wish.seed,
            "num_images": wish.count,
            "negative_prompt": wish.negative_prompt,
        }
        config = ml_collections.ConfigDict(values)
        config_lib.check(config)
        if wish.count > MAX_IMAGES:
            raise UserError(f"{wish.count} images at once are too many for a page; ask for {MAX_IMAGES} at most")
        if wish.seed >= 2**31:
            raise UserError(f"the seed {wish.seed} is too large; choose one below {2**31:,}")
        return config

    def _requests(self, wish: Wish) -> Requests:
        if isinstance(self._condition, Texts):
            if not wish.prompt.strip():
                raise UserError("the prompt is empty; write what the image should show")
            context, null = self._condition.encode(self._encoder, [wish.prompt.strip(), wish.negative_prompt.strip()])
        else:
            classes = self.config.model.num_classes
            if not 0 <= wish.label < classes:
                raise UserError(f"there is no class {wish.label}; choose one from 0 to {classes - 1}")
            context, null = np.asarray(wish.label, np.int32), np.asarray(classes, np.int32)
        return Requests(wish.count, lambda index: np.stack([context] * len(index)), null)


def class_names(config: ml_collections.ConfigDict) -> list[str] | None:
    """Names of the classes as the data of the config gives them; None if it isn't here, or is of other classes."""
    try:
        names = sources.open_source(config.data).class_names
    except UserError:
        return None
    return names if len(names) == config.model.num_classes else None


# ---------------------------------------------------------------------------------------- pictures


def shown(batch: np.ndarray) -> np.ndarray:
    """uint8 [count, height, width, 3], enlarged by a whole factor until an image can be seen well."""
    factor = max(1, SMALLEST_SHOWN // max(batch.shape[1:3]))
    return batch.repeat(factor, axis=1).repeat(factor, axis=2)


def animation(states: Sequence[np.ndarray]) -> bytes:
    """States [count, height, width, 3] of a trajectory as one animated WebP of grids, the last held longer."""
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
    """HTML of a picture that carries its own bytes."""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style, text = "max-width: 100%; max-height: 70vh; border-radius: 8px", html.escape(caption)
    image = f'<img src="{uri}" alt="{text}" style="{style}">'
    return f'<figure style="margin: 0">{image}<figcaption>{text}</figcaption></figure>'


def preview(batch: np.ndarray, caption: str) -> str:
    """HTML of the images as they are now."""
    data = io.BytesIO()
    Image.fromarray(images.grid(shown(batch))).save(data, format="webp", quality=75, method=0)
    return figure(data.getvalue(), "webp", caption)


# ---------------------------------------------------------------------------------------- the page

# Names of what every system has; Gradio's own would be files that it serves.
FONT = ("system-ui", "sans-serif")
FONT_MONO = ("ui-monospace", "monospace")


def make_page(gradio: Any, studio: Studio) -> Any:
    """The page: fields on the left, what is drawn on the right."""
    config, sample, model = studio.config, studio.config.sample, studio.config.model
    height, width = image_sides(config.data.image_size)
    names = None if model.text_width else class_names(config)
    patch = model.patch_size
    title = f"deco_jax: {studio.where.parent.parent.name or model.name}, step {studio.where.name}"

    def side(label: str, value: int) -> Any:
        return gradio.Slider(patch * -(-8 // patch), 4 * value, value=value, step=patch, label=label)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {html.escape(title)}\n{html.escape(describe(config))}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                asked: dict[str, Any] = {}
                if model.text_width:
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
                    asked["sampler"] = gradio.Dropdown(list(SAMPLERS), value=sample.sampler, label="Sampler")
                    asked["shift"] = gradio.Slider(
                        0.1,
                        max(10, sample.shift),
                        value=sample.shift,
                        step=0.1,
                        label="Time shift (more: longer in the noise)",
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
                yield from fulfil(studio, read_wish({name: values[field] for name, field in asked.items()}), progress)
            except UserError as error:
                raise gradio.Error(str(error), print_exception=False) from error

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
    """The model in a line."""
    model, (height, width) = config.model, image_sides(config.data.image_size)
    kind = "text to image" if model.text_width else f"{model.num_classes} classes"
    return f"{model.name}, {kind}, trained at {height}×{width}: width {model.width}, {model.depth} blocks."


def read_wish(values: dict[str, Any]) -> Wish:
    """The page's fields. UserError for one that is empty or no number."""
    kinds = {"int": int, "float": float, "str": str}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Wish):
        if field.name not in values:
            continue
        try:
            found[field.name] = kinds[str(field.type)](values[field.name])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{field.name.replace('_', ' ')}: {values[field.name]!r} won't do; fill it in") from None
    return Wish(**found)


def fulfil(studio: Studio, wish: Wish, progress: Any) -> Iterator[tuple[Any, Any]]:
    """What the page shows, from the noise to the images: (gallery, view) again and again."""
    states: list[np.ndarray] = []
    began = spoke = time.monotonic()
    first = 0.0
    progress((0, wish.num_steps), desc="compiling, if this size is new", unit="steps")
    for look in studio.draw(wish):
        if look.images is None:
            continue
        states.append(look.images)
        step = len(states) - 1
        if step:
            first = first or time.monotonic() - began
            progress((step, wish.num_steps), desc="drawing", unit="steps")
        if look.done < look.total and (not step or time.monotonic() - spoke > PREVIEW_SECONDS):
            spoke = time.monotonic()
            yield [], preview(look.images, f"step {step} of {wish.num_steps}")
    took = time.monotonic() - began
    caption = (
        f"From noise to image in {wish.num_steps} steps of {wish.sampler}, guidance {wish.guidance:g}, "
        f"shift {wish.shift:g}, seed {wish.seed}: {took:.1f} s, {first:.1f} s of them until the first step was done"
    )
    pictures = [Image.fromarray(image) for image in shown(states[-1])]
    yield pictures, figure(animation(states), "webp", caption)
