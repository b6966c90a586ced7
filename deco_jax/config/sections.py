"""All settings, section by section. The defaults are those of DeCo-XL/16 on ImageNet 256², as in the paper.

To add a setting, add a line here; for a setting of a model or a loss, add it in that model's or loss's file.
"""

from __future__ import annotations

import dataclasses

from deco_jax.config.failures import FailureSettings
from deco_jax.data.sources import SOURCES
from deco_jax.data.transforms import image_sides
from deco_jax.evaluation import DISTANCES, EVALUATORS
from deco_jax.method.lora import LoraSettings
from deco_jax.method.losses.frequency import FrequencySettings
from deco_jax.method.losses.mean_flow import MeanFlowSettings
from deco_jax.method.losses.perceptual import PerceptualSettings
from deco_jax.method.losses.pseudo_huber import PseudoHuberSettings
from deco_jax.method.losses.reg import RegSettings
from deco_jax.method.losses.repa import RepaSettings
from deco_jax.method.paths import PATHS
from deco_jax.models.network import SETTINGS as MODEL_SETTINGS
from deco_jax.models.teachers import SIZES as TEACHER_SIZES
from deco_jax.models.teachers import TEACHERS
from deco_jax.sampling.guidance import RULES
from deco_jax.sampling.samplers import SAMPLERS
from deco_jax.schema import MAX_INT32, Rule, Setting, above, at_least, between, one_of, setting, settings

SEED = between(0, 2**63 - 1)  # the range that JAX makes keys from
AXIS = Rule(lambda n: n == -1 or 1 <= n <= 2**20, "at least 1, or -1 for all the rest")
BENCHMARK_PARTS = {"train", "forward", "sample", "input", "inception", "torch"}
MOMENT = Rule(lambda b: 0 <= b < 1, "from 0 to below 1")
PRECISION = one_of("bfloat16", "float32")
MAX_SIDE = 8192
IMAGE_SIZE = Rule(
    lambda size: (
        all(isinstance(side, int) and 8 <= side <= MAX_SIDE for side in image_sides(size))
        and len(image_sides(size)) == 2
    ),
    f"a side of at least 8 pixels and at most {MAX_SIDE:,}, or (height, width)",
)
INTERVAL = Rule(
    lambda pair: len(pair) == 2 and (pair[0] == -1 or pair[0] >= 0) and pair[0] <= pair[1] <= 1,
    "two times (low, high) within 0..1, or low = -1",
)


@dataclasses.dataclass(frozen=True)
class Top:
    """Settings of the whole run."""

    seed: int = setting(0, "Seed of the initial weights, the order of the data, the noise and the times.", SEED)
    init_from: str = setting("", "Run folder or checkpoint whose weights a new run starts from; empty: none.")
    init_optimizer: bool = setting(False, "Also take over the optimizer's moments from init_from.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The images to train on."""

    source: str = setting("image_folder", "Kind of dataset.", one_of(*SOURCES))
    path: str = setting("", "Folder of the data; a single .tar works for webdataset, a single file for parquet.")
    split: str = setting("", "Subfolder of path; for tfds and parquet the split (tfds uses train if empty).")
    image_column: str = setting("image", "For parquet: the column with the images.")
    label_column: str = setting("label", "For parquet: the column with the labels.")
    caption_column: str = setting("", "For parquet: the column with the captions, instead of labels.")
    captions: str = setting(
        "",
        "Several captions per image, drawn at random by weight, as comma-separated NAME=WEIGHT. A NAME is a column of "
        "parquet or a field of webdataset's .json; for captioned_folder, txt means NAME.txt and X means NAME.X.txt. "
        "Empty: one caption.",
    )
    image_size: int | tuple[int, int] = setting(
        (256, 256), "Size of the images in pixels: one side, or (height, width).", IMAGE_SIZE
    )
    prepared_images: str = setting(
        "pixels",
        "How --mode=prepare stores images: cropped to image_size, as pixels or png; or as the unchanged files.",
        one_of("pixels", "png", "files"),
    )
    batch_size: int = setting(256, "Images per training step, over all devices and hosts.", at_least(1, 2**20))
    num_workers: int = setting(
        16, "Processes per host that read and decode images; 0: the main process does.", at_least(0, 256)
    )
    validation_split: str = setting(
        "",
        "Held-out images, as data.split gives those of training: a subfolder of path (of prepared data, too), or a "
        "split of tfds and parquet; empty: none.",
    )
    validation_images: int = setting(
        1024, "Held-out images that the validation loss uses at most, in whole batches.", at_least(1, 10_000_000)
    )
    flip: bool = setting(False, "Mirror half of the images at random; the paper doesn't.")
    fast_crop: bool = setting(
        False,
        "Resize only what the crop keeps: an eighth less work, but one pixel in a few thousand is off by one level.",
    )
    random_crop: bool = setting(False, "Crop images at random, to at least 0.8 of the shorter side; the paper doesn't.")
    weights: str = setting(
        "", "Shares of several datasets of one kind, such as 3,1, in the order of their comma-separated paths in path."
    )
    prior_path: str = setting(
        "", "A second dataset, half of each batch, that keeps the model from forgetting what it knew; empty: none."
    )
    measured_images: int = setting(
        10_000,
        "Images, at most, that a new run measures before its first step if its prediction depends on the data.",
        at_least(1, MAX_INT32),
    )
    max_unreadable: float = setting(
        0.001, "Share of the images that may be unreadable before training stops.", between(0, 1)
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are arranged."""

    data: int = setting(-1, "Devices along the axis that splits the batch; -1: all remaining ones.", AXIS)
    fsdp: int = setting(
        1, "Devices along the axis that also splits weights and optimizer; -1: all remaining ones.", AXIS
    )
    slices: int = setting(
        1, "Slices of a pod, joined by a data centre's network; data and fsdp apply to each slice.", at_least(1, 2**16)
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and the averages of the weights."""

    name: str = setting(
        "adamw",
        "adamw; or muon, which uses Muon for matrices and AdamW for the rest, at the same rate.",
        one_of("adamw", "muon"),
    )
    learning_rate: float = setting(1e-4, "Learning rate after the warm-up.", above(0, 1e38))
    schedule: str = setting(
        "constant",
        "Learning rate after the warm-up: constant, or falling from decay_start to decay_end as a cosine or a line.",
        one_of("constant", "cosine", "linear"),
    )
    decay_start: int = setting(0, "Step from which the learning rate falls.", at_least(0, MAX_INT32))
    decay_end: int = setting(0, "Step from which the learning rate is final_learning_rate.", at_least(0, MAX_INT32))
    final_learning_rate: float = setting(0.0, "Learning rate at the end of the decay.", at_least(0, 1000))
    stages: str = setting(
        "", "Later learning rates and clipping norms, as comma-separated STEP:RATE or STEP:RATE:NORM; empty: none."
    )
    muon_momentum: float = setting(0.95, "For muon: decay of the matrices' momentum.", MOMENT)
    b1: float = setting(0.9, "Decay of the first moment.", MOMENT)
    b2: float = setting(0.999, "Decay of the second moment.", MOMENT)
    eps: float = setting(1e-8, "Constant added to the denominator of the update.", above(0, 1))
    weight_decay: float = setting(0.0, "Decoupled weight decay.", at_least(0, 1000))
    clip_norm: float = setting(0.0, "Norm to clip gradients to; 0: no clipping.", at_least(0, 1e9))
    warmup_steps: int = setting(0, "Steps over which the learning rate rises linearly.", at_least(0, MAX_INT32))
    accumulate_steps: int = setting(
        1, "Parts into which a batch is split and computed one after the other, to save memory.", at_least(1, 2**16)
    )
    ema_decay: float = setting(0.9999, "Decay per step of the moving average of the weights named ema.", between(0, 1))
    averages: str = setting(
        "", "More averages of the weights, each with a decay or a half-life in images: short=0.9996,k500=500kimg."
    )


@dataclasses.dataclass(frozen=True)
class Loss(FrequencySettings, RepaSettings, RegSettings, PerceptualSettings, MeanFlowSettings, PseudoHuberSettings):
    """The training loss, a weighted sum."""

    # The losses declare their own settings in method/losses.

    label_dropout: float = setting(
        0.2, "Share of the images that are trained without class or caption, for guidance.", between(0, 1)
    )
    prior_weight: float = setting(
        1.0, "Weight in the loss of an image from data.prior_path; the others have 1.", above(0, 1000)
    )
    time_shift: float = setting(1.0, "Shift of the training times towards noise; 1: none.", above(0, 1000))
    time_mean: float = setting(
        0.0,
        "Mean of the normal distribution of the logit-normal times.",
        Rule(lambda value: -100 <= value <= 100, "a finite number from -100 to 100"),
    )
    time_std: float = setting(1.0, "Standard deviation of that normal distribution.", at_least(0, 100))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen encoder of loss.repa_weight, loss.class_token_weight and loss.dino_weight."""

    name: str = setting("dinov2", "Kind of encoder.", one_of(*TEACHERS))
    path: str = setting("", "File of its weights, such as dinov2_vitb14_pretrain.pth.")
    size: str = setting("B", "Its size; for vgg the tap, 1 to 5.", one_of(*TEACHER_SIZES))
    dtype: str = setting("bfloat16", "Precision of its computation.", PRECISION)


@dataclasses.dataclass(frozen=True)
class Path:
    """The path from noise to images."""

    name: str = setting(
        "linear", "linear: a straight line; energy: towards an image that sharpens along the path.", one_of(*PATHS)
    )
    noise_scale: float = setting(
        1.0, "Standard deviation of the noise at the start of the path; JiT uses 2 at 512x512.", above(0, 1000)
    )


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """The network of the LPIPS loss and of the metric lpips."""

    vgg: str = setting("", "File of VGG16's weights: torchvision's vgg16-397923af.pth.")
    linear: str = setting("", "File of its linear layers: vgg.pth of the lpips package, version 0.1.")
    dtype: str = setting("bfloat16", "Precision of its convolutions.", PRECISION)
    pixels_per_patch: int = setting(
        16,
        "Images are resized until a patch's side has this many pixels, so that small patches are seen as the published "
        "models' are; the cost grows with the square. 32² images with patches of 4 become 128². 0: no resizing.",
        at_least(0, 64),
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """The text encoder; used only if model.text_width is above 0."""

    encoder: str = setting(
        "qwen3",
        "qwen3: a language model; bytes: the bytes of the caption themselves, which needs no files.",
        one_of("qwen3", "bytes"),
    )
    path: str = setting("", "For qwen3: its Hugging Face folder.")
    prefix: str = setting(
        "", "Prefix for half of the captions under 30 words in training, such as 'A photo of '; empty: none."
    )
    dtype: str = setting("bfloat16", "Precision of qwen3's computation.", PRECISION)
    features: str = setting(
        "", "Folder that --mode=encode fills and training reads; empty: encode the captions in each step."
    )
    validation_features: str = setting(
        "", "The same for data.validation_split; needed if features is set and the validation loss is measured."
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """How images are drawn, in --mode=sample and in the grids during training."""

    num_images: int = setting(
        64,
        "Images to draw, spread evenly over the classes or the data's captions; given prompts set their own number.",
        at_least(1, 10_000_000),
    )
    prompts: str = setting("", "Text to image: a prompt, or a file or folder of prompts; empty: captions of the data.")
    negative_prompt: str = setting("", "Text to image: prompt that guidance leads away from; empty: no caption.")
    images_per_prompt: int = setting(
        0, "Images per prompt; 0: the number that the prompts' benchmark asks for, otherwise 1.", at_least(0, 10_000)
    )
    classes: str = setting("", "Class to image: comma-separated numbers or names of the classes to draw; empty: all.")
    same_noise: bool = setting(False, "Class to image: start the k-th image of every class from the same noise.")
    average: str = setting("ema", "Average of the weights that draws the images.")
    batch_size: int = setting(64, "Images to draw at a time, over all devices.", at_least(1, 2**16))
    num_steps: int = setting(100, "Number of sampling steps.", at_least(1, 10_000))
    sampler: str = setting("euler", "Solver of the differential equation.", one_of(*SAMPLERS))
    guidance: float = setting(3.2, "Scale of classifier-free guidance; 1: none.", at_least(0, 1000))
    guidance_interval: tuple[float, float] = setting(
        (0.1, 1.0),
        "Times (low, high] at which guidance acts; noise is 0, the image 1; a low of -1 includes the first step.",
        INTERVAL,
    )
    guidance_times: str = setting(
        "step",
        "Time that decides: the start of a step, or that of each evaluation; they differ for heun.",
        one_of("step", "evaluation"),
    )
    guidance_rule: str = setting(
        "plain",
        "plain; or zero_star (CFG-Zero*), which scales the unconditional velocity for the best fit and starts with "
        "steps of velocity zero.",
        one_of(*RULES),
    )
    guidance_zero_steps: int = setting(1, "For zero_star: number of first steps at velocity zero.", at_least(0, 10_000))
    guidance_rescale: float = setting(
        0.0,
        "Share of the guided velocity to rescale to the conditional one's spread; DeCo's code uses 0.7; 0: none.",
        between(0, 1),
    )
    guidance_model: str = setting(
        "", "Run or checkpoint of a weaker model that guidance leads away from, with the same condition (autoguidance)."
    )
    guidance_average: str = setting(
        "", "Average of the weaker model; without guidance_model, one of this run, such as a shorter one. Empty: ema."
    )
    shift: float = setting(1.0, "Shift of the sampling times towards noise; 1: none.", above(0, 1000))
    seed: int = setting(0, "Seed of the noise; an image depends only on the seed and its index.", SEED)
    npz: bool = setting(False, "Also write samples/samples.npz: arr_0, uint8 [images, height, width, 3].")
    png: bool = setting(False, "Also write each image to a file of its own in samples/images.")
    grid_images: int = setting(64, "Largest number of images in a grid.", at_least(1, 10_000))
    grid_columns: int = setting(
        0,
        "Columns of a grid; 0: one row per class if that works out evenly, otherwise near square.",
        at_least(0, 10_000),
    )


@dataclasses.dataclass(frozen=True)
class Train(FailureSettings):
    """The training loop."""

    num_steps: int = setting(
        1_600_000, "Steps to train, counted from the beginning of the run.", at_least(1, MAX_INT32 - 1)
    )
    log_every: int = setting(100, "Steps between two lines of metrics.", at_least(1, MAX_INT32))
    save_every: int = setting(5000, "Steps between two checkpoints.", at_least(1, MAX_INT32))
    sample_every: int = setting(10_000, "Steps between two grids of samples; 0: none.", at_least(0, MAX_INT32))
    validate_every: int = setting(
        0,
        "Steps between two validation losses, measured with sample.average; a multiple of log_every; 0: none.",
        at_least(0, MAX_INT32),
    )
    keep_checkpoints: int = setting(3, "Number of newest checkpoints to keep.", at_least(1, MAX_INT32))
    keep_every: int = setting(
        0, "Steps between two checkpoints that are kept for good; 0: none.", at_least(0, MAX_INT32)
    )
    keep_best: str = setting(
        "",
        "Also keep the checkpoint with the best score: fid (with evaluate.every) or validation_loss (with "
        "train.validate_every), which are then measured on saved steps; empty: none.",
    )
    max_skipped_steps: int = setting(
        10, "Consecutive steps with a non-finite loss or gradient before training stops.", at_least(0, MAX_INT32)
    )
    wandb: str = setting(
        "", "Weights & Biases project that also gets metrics, grids and scores (pip install wandb); empty: none."
    )
    log_json: bool = setting(False, "Print each line of metrics as JSON on stdout, and everything else on stderr.")
    profile_start: int = setting(
        0, "Steps of this process before a TensorBoard trace starts; 0: no trace.", at_least(0, MAX_INT32)
    )
    profile_steps: int = setting(5, "Steps in the trace.", at_least(1, 10_000))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """FID and other scores, in --mode=evaluate and during training."""

    metrics: str = setting(
        "adm",
        "What to measure, comma separated: adm (FID, sFID, Inception Score, precision, recall), kid, fd_dinov2, "
        "lpips (weights: config.lpips), clip_score, validation_loss (on data.validation_split).",
        Rule(
            lambda text: bool(text) and set(text.split(",")) <= set(EVALUATORS),
            f"some of {', '.join(EVALUATORS)}, comma separated",
        ),
    )
    averages: tuple[str, ...] = setting(
        (), "Averages of the weights to try, to find the best; empty: only sample.average."
    )
    guidances: tuple[float, ...] = setting(
        (),
        "Guidance scales to try, such as 1.0,1.5; empty: only sample.guidance.",
        Rule(lambda scales: all(0 <= scale <= 1000 for scale in scales), "numbers from 0 to 1000"),
    )
    guidance_intervals: tuple[tuple[float, float], ...] = setting(
        (),
        "Guidance intervals to try, such as (0.1,1.0),(0.2,0.9); empty: only sample.guidance_interval.",
        Rule(lambda pairs: all(map(INTERVAL.test, pairs)), "pairs (low, high) of times within 0..1"),
    )
    steps: tuple[int, ...] = setting(
        (),
        "Numbers of steps to try, such as 25,50; empty: only sample.num_steps.",
        Rule(lambda counts: all(isinstance(n, int) and 1 <= n <= 10_000 for n in counts), "whole numbers from 1"),
    )
    search_images: int = setting(
        10_000,
        "Samples per combination; the best one is measured again with sample.num_images.",
        at_least(2, 10_000_000),
    )
    best_by: str = setting("fid", "Score that picks the best combination; lower is better.", one_of(*DISTANCES))
    inception: str = setting(
        "", "File of Inception's weights: inception-2015-12-05.pt, or pt_inception-2015-12-05-6726825d.pth."
    )
    reference: str = setting("", "ADM reference .npz; empty: the images of config.data.")
    samples: str = setting(
        "", "A samples.npz or a folder of images to measure; empty: draw samples as config.sample says."
    )
    cache: str = setting(
        "", "Folder for the statistics of references, which runs can share; empty: WORKDIR/evaluation."
    )
    num_reference: int = setting(
        0, "Images of config.data to compare with, evenly spaced; 0: all.", at_least(0, MAX_INT32)
    )
    batch_size: int = setting(64, "Images per batch of the Inception network.", at_least(1, 2**16))
    precision_recall_reference: int = setting(
        10_000, "Reference images for precision and recall, at most; 0: don't measure them.", at_least(0, 1_000_000)
    )
    precision_recall_samples: int = setting(
        50_000, "Samples for precision and recall, at most; 0: don't measure them.", at_least(0, 1_000_000)
    )
    dinov2: str = setting("", "For fd_dinov2: file of its weights, such as dinov2_vitl14_pretrain.pth.")
    dinov2_size: str = setting("L", "Size of that network; published scores use L.", one_of("S", "B", "L"))
    dinov2_dtype: str = setting("float32", "Precision of its computation.", PRECISION)
    clip: str = setting("", "For clip_score: CLIP's Hugging Face folder.")
    lpips_images: int = setting(1000, "For lpips: number of images of config.data to denoise.", at_least(1, 10_000_000))
    lpips_time: float = setting(0.5, "For lpips: time to which these images are noised.", between(0, 1))
    kid_subsets: int = setting(100, "Number of random subsets over which KID is averaged.", at_least(1, 100_000))
    kid_subset_size: int = setting(1000, "Images per subset.", at_least(2, 1_000_000))
    save_every: int = setting(5000, "Images between two saves of an evaluation's progress.", at_least(1, MAX_INT32))
    every: int = setting(
        0, "Training steps between two quick FIDs, a multiple of train.log_every; 0: none.", at_least(0, MAX_INT32)
    )
    during_training_images: int = setting(5000, "Samples for a quick FID.", at_least(2, 10_000_000))


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Energy spectra, in --mode=spectrum."""

    checkpoints: str = setting("", "Comma-separated workdirs or checkpoints to compare; empty: this workdir's newest.")
    num_images: int = setting(64, "Images to draw and measure.", at_least(1, 1_000_000))
    batch_size: int = setting(
        8, "Images at a time; their states at all sampling steps are kept in memory.", at_least(1, 2**16)
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """The page that --mode=report writes."""

    workdirs: str = setting("", "Comma-separated workdirs of the runs to show side by side; empty: this workdir.")
    grids: int = setting(
        12, "Largest number of a run's sample grids to show, evenly spaced over time.", at_least(1, 10_000)
    )
    grid_pixels: int = setting(
        768, "Maximum length of an embedded grid's longer side, in pixels.", at_least(64, 16_384)
    )


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What --mode=benchmark times, and how often."""

    warmup: int = setting(3, "Untimed runs before the timed ones.", at_least(1, 1_000_000))
    repeats: int = setting(20, "Number of timed runs.", at_least(1, 1_000_000))
    parts: str = setting(
        "train,forward,sample,input",
        "What to time, comma separated: train, forward, sample, input, inception, torch (PyTorch's input pipeline).",
        Rule(
            lambda text: bool(text) and set(text.split(",")) <= BENCHMARK_PARTS,
            "some of train, forward, sample, input, inception, torch, comma separated",
        ),
    )


SECTION_CLASSES: dict[str, type] = {
    "data": Data,
    "mesh": Mesh,
    "optimizer": Optimizer,
    "loss": Loss,
    "teacher": Teacher,
    "path": Path,
    "lora": LoraSettings,
    "lpips": LPIPS,
    "text": Text,
    "sample": Sample,
    "train": Train,
    "evaluate": Evaluate,
    "spectrum": Spectrum,
    "report": Report,
    "benchmark": Benchmark,
}
TOP: dict[str, Setting] = settings(Top)
SECTIONS: dict[str, dict[str, Setting]] = {name: settings(section) for name, section in SECTION_CLASSES.items()}
# The section "model" has the settings of the model whose name is its "name".
MODEL: dict[str, dict[str, Setting]] = {
    name: {
        "name": Setting((str,), name, "The network.", one_of(*MODEL_SETTINGS), False, "", lambda value: value),
        **settings(section),
    }
    for name, section in MODEL_SETTINGS.items()
}
# Settings that only say how a model is computed; its parameters don't depend on them.
COMPUTED = tuple(
    dict.fromkeys(name for section in MODEL.values() for name, declared in section.items() if declared.computed)
)
