"""Every setting there is, section by section. The defaults are DeCo-XL/16 on ImageNet 256², as in the paper.

A setting is added by one line here; one of a model or of a loss by one line in that model's or loss's file.
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

SEED = between(0, 2**63 - 1)  # what JAX makes keys of
AXIS = Rule(lambda n: n == -1 or 1 <= n <= 2**20, "at least 1, or -1 for all that is left")
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
    lambda pair: len(pair) == 2 and -1 <= pair[0] <= pair[1] <= 1, "two times (low, high) within 0..1, or low = -1"
)


@dataclasses.dataclass(frozen=True)
class Top:
    """Settings of the whole run."""

    seed: int = setting(0, "Seed of the first weights, of the order of the data, of noise and times.", SEED)
    init_from: str = setting("", "A run's folder or a checkpoint whose weights a new run starts from; empty: none.")
    init_optimizer: bool = setting(False, "Take over the optimizer's moments of init_from as well.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The images to train on."""

    source: str = setting("image_folder", "Kind of data set.", one_of(*SOURCES))
    path: str = setting("", "Folder of the data; for webdataset also a single .tar, for parquet a single file.")
    split: str = setting("", "A subfolder of path; for tfds and parquet the split, for tfds train if empty.")
    image_column: str = setting("image", "Of parquet: the column of the images.")
    label_column: str = setting("label", "Of parquet: the column of the labels.")
    caption_column: str = setting("", "Of parquet: the column of the captions, instead of labels.")
    captions: str = setting(
        "",
        "Several captions an image, drawn by weight, as NAME=WEIGHT with commas: columns of parquet, fields of "
        "webdataset's .json, of captioned_folder txt for NAME.txt and any X for NAME.X.txt; empty: one.",
    )
    image_size: int | tuple[int, int] = setting(
        (256, 256), "Size of the images in pixels: a side, or (height, width).", IMAGE_SIZE
    )
    prepared_images: str = setting(
        "pixels",
        "How --mode=prepare stores images: cropped to image_size as pixels or as png, or the files as they are.",
        one_of("pixels", "png", "files"),
    )
    batch_size: int = setting(256, "Images in a training step, over all devices and hosts.", at_least(1, 2**20))
    num_workers: int = setting(
        16, "Processes on each host that read and decode images; 0: the main process.", at_least(0, 256)
    )
    validation_split: str = setting(
        "", "Images that are not trained on, as a subfolder of path or a split of tfds; empty: none."
    )
    validation_images: int = setting(
        1024, "How many of them the validation loss takes at most, in whole batches.", at_least(1, 10_000_000)
    )
    flip: bool = setting(False, "Mirror half of the images at random; the paper's recipe does not.")
    fast_crop: bool = setting(
        False, "Resize only what the crop keeps: an eighth less work, one pixel in some thousands off by one level."
    )
    random_crop: bool = setting(
        False, "Cut images at random, at least 0.8 of the shorter side; the paper's recipe does not."
    )
    weights: str = setting(
        "", "For several data sets of one kind, their paths comma separated in path: each one's share, as in 3,1."
    )
    prior_path: str = setting(
        "", "A second data set, half of each batch, that keeps the model from forgetting what it could; empty: none."
    )
    measured_images: int = setting(
        10_000,
        "Images that a new run measures before its first step, at most, where its prediction goes by the data.",
        at_least(1, MAX_INT32),
    )
    max_unreadable: float = setting(
        0.001, "Share of the images that may be unreadable before training stops.", between(0, 1)
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are arranged."""

    data: int = setting(-1, "Devices along the axis that splits the batch; -1: all that are left.", AXIS)
    fsdp: int = setting(1, "Devices along the axis that also splits weights and optimizer; -1: all left.", AXIS)
    slices: int = setting(
        1, "Slices of a pod, which only a data centre's network joins; data and fsdp are of each.", at_least(1, 2**16)
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and the average of the weights."""

    name: str = setting(
        "adamw", "adamw, or muon: matrices by Muon, the rest by AdamW at the same rate.", one_of("adamw", "muon")
    )
    learning_rate: float = setting(1e-4, "Step size after the warm-up.", above(0, 1e38))
    schedule: str = setting(
        "constant",
        "How the learning rate goes on: constant, or falling from decay_start to decay_end as a cosine or a line.",
        one_of("constant", "cosine", "linear"),
    )
    decay_start: int = setting(0, "Step from which it falls.", at_least(0, MAX_INT32))
    decay_end: int = setting(0, "Step from which it is final_learning_rate.", at_least(0, MAX_INT32))
    final_learning_rate: float = setting(0.0, "What it falls to.", at_least(0, 1000))
    stages: str = setting(
        "", "Later rates and norms to clip to, as STEP:RATE or STEP:RATE:NORM, comma separated; empty: none."
    )
    muon_momentum: float = setting(0.95, "Of muon: decay of the matrices' momentum.", MOMENT)
    b1: float = setting(0.9, "Decay of the first moment.", MOMENT)
    b2: float = setting(0.999, "Decay of the second moment.", MOMENT)
    eps: float = setting(1e-8, "Added to the denominator of the update.", above(0, 1))
    weight_decay: float = setting(0.0, "Decoupled weight decay.", at_least(0, 1000))
    clip_norm: float = setting(0.0, "Norm that gradients are clipped to; 0: not clipped.", at_least(0, 1e9))
    warmup_steps: int = setting(0, "Steps over which the learning rate rises linearly.", at_least(0, MAX_INT32))
    accumulate_steps: int = setting(
        1, "Parts that a batch is worked through in, one after the other, to save memory.", at_least(1, 2**16)
    )
    ema_decay: float = setting(
        0.9999, "Decay per step of the moving average of the weights that is called ema.", between(0, 1)
    )
    averages: str = setting(
        "", "More averages of the weights by name, with a decay or a half-life in images: short=0.9996,k500=500kimg."
    )


@dataclasses.dataclass(frozen=True)
class Loss(FrequencySettings, RepaSettings, RegSettings, PerceptualSettings, MeanFlowSettings, PseudoHuberSettings):
    """What is minimised. The losses declare their own settings in method/losses."""

    label_dropout: float = setting(
        0.2, "Share of the images trained without their class or caption, for guidance.", between(0, 1)
    )
    prior_weight: float = setting(
        1.0, "What an image of data.prior_path counts in the loss, beside 1 for the others.", above(0, 1000)
    )
    time_shift: float = setting(1.0, "Shift of the training times towards noise; 1: none.", above(0, 1000))
    time_mean: float = setting(
        0.0,
        "Mean of the normal distribution behind the logit-normal times.",
        Rule(lambda value: -100 <= value <= 100, "a finite number from -100 to 100"),
    )
    time_std: float = setting(1.0, "Standard deviation of the same.", at_least(0, 100))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen encoder to align with, read where repa_, class_token_ or dino_weight is above 0."""

    name: str = setting("dinov2", "Kind of encoder.", one_of(*TEACHERS))
    path: str = setting("", "Its weights, such as dinov2_vitb14_pretrain.pth.")
    size: str = setting("B", "Its size; of vgg the tap, 1 to 5.", one_of(*TEACHER_SIZES))
    dtype: str = setting("bfloat16", "Precision of its computation.", PRECISION)


@dataclasses.dataclass(frozen=True)
class Path:
    """The way from noise to images."""

    name: str = setting(
        "linear", "linear: a straight line; energy: towards an image that sharpens on the way.", one_of(*PATHS)
    )
    noise_scale: float = setting(
        1.0, "Standard deviation of the noise that it starts from; JiT has 2 at 512x512.", above(0, 1000)
    )


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """The network that compares images, read only where loss.lpips_weight is above 0."""

    vgg: str = setting("", "Weights of VGG16: torchvision's vgg16-397923af.pth.")
    linear: str = setting("", "Its linear layers: vgg.pth of the lpips package, version 0.1.")
    dtype: str = setting("bfloat16", "Precision of its convolutions.", PRECISION)


@dataclasses.dataclass(frozen=True)
class Text:
    """The text encoder, read only where model.text_width is above 0."""

    encoder: str = setting(
        "qwen3",
        "qwen3: a language model; bytes: the caption's letters as they are, no files needed.",
        one_of("qwen3", "bytes"),
    )
    path: str = setting("", "Of qwen3: its Hugging Face folder.")
    prefix: str = setting(
        "", "Put before half of the captions under 30 words while training, such as 'A photo of '; empty: none."
    )
    dtype: str = setting("bfloat16", "Precision of qwen3's computation.", PRECISION)
    features: str = setting(
        "", "Folder that --mode=encode fills and training reads; empty: captions are encoded in each step."
    )
    validation_features: str = setting(
        "", "The same of data.validation_split, where features is set and the validation loss is measured."
    )


@dataclasses.dataclass(frozen=True)
class Sample:
    """Drawing images, in --mode=sample and in the grids while training."""

    num_images: int = setting(
        64,
        "Images to draw, spread evenly over the classes or the data's captions; given prompts count themselves.",
        at_least(1, 10_000_000),
    )
    prompts: str = setting("", "Text to image: a prompt, or a file or folder of prompts; empty: the data's captions.")
    negative_prompt: str = setting("", "Text to image: what guidance leads away from; empty: no caption.")
    images_per_prompt: int = setting(
        0, "Images of each prompt; 0: what the prompts' benchmark asks for, else 1.", at_least(0, 10_000)
    )
    classes: str = setting("", "Class to image: numbers or names of the classes to draw, comma separated; empty: all.")
    same_noise: bool = setting(False, "Class to image: the k-th image of every class starts from the same noise.")
    average: str = setting("ema", "The average of the weights that images are drawn from.")
    batch_size: int = setting(64, "Images drawn at once, over all devices.", at_least(1, 2**16))
    num_steps: int = setting(100, "Steps of the sampler.", at_least(1, 10_000))
    sampler: str = setting("euler", "How the differential equation is solved.", one_of(*SAMPLERS))
    guidance: float = setting(3.2, "Scale of classifier-free guidance; 1: none.", at_least(0, 1000))
    guidance_interval: tuple[float, float] = setting(
        (0.1, 1.0),
        "Times (low, high] within which guidance acts; noise is 0, the image 1; a low of -1 takes the first step in.",
        INTERVAL,
    )
    guidance_times: str = setting(
        "step",
        "What is within: a step's start, or each evaluation's own time; they differ for heun.",
        one_of("step", "evaluation"),
    )
    guidance_rule: str = setting(
        "plain",
        "plain, or zero_star: scales the velocity without a condition to fit best and waits at first (CFG-Zero*).",
        one_of(*RULES),
    )
    guidance_zero_steps: int = setting(1, "Of zero_star: first steps that wait.", at_least(0, 10_000))
    guidance_rescale: float = setting(
        0.0,
        "Share of the guided velocity that is rescaled to the conditional one's spread; DeCo's code has 0.7; 0: none.",
        between(0, 1),
    )
    guidance_model: str = setting(
        "", "A run or checkpoint whose weaker model guidance leads away from, with the same condition (autoguidance)."
    )
    guidance_average: str = setting(
        "", "Its average of the weights; without guidance_model one of this run, such as a shorter one. Empty: ema."
    )
    shift: float = setting(1.0, "Shift of the sampling times towards noise; 1: none.", above(0, 1000))
    seed: int = setting(0, "Seed of the noise; an image depends on it and on its index alone.", SEED)
    npz: bool = setting(False, "Also write samples/samples.npz: arr_0, uint8 [images, height, width, 3].")
    png: bool = setting(False, "Also write each image as a file in samples/images.")
    grid_images: int = setting(64, "Images in a grid, at most.", at_least(1, 10_000))
    grid_columns: int = setting(
        0, "Columns of a grid; 0: a row for each class where they come out even, else near square.", at_least(0, 10_000)
    )


@dataclasses.dataclass(frozen=True)
class Train(FailureSettings):
    """The training loop."""

    num_steps: int = setting(1_600_000, "Steps to train, counted from the very first.", at_least(1, MAX_INT32 - 1))
    log_every: int = setting(100, "Steps between two lines of metrics.", at_least(1, MAX_INT32))
    save_every: int = setting(5000, "Steps between two checkpoints.", at_least(1, MAX_INT32))
    sample_every: int = setting(10_000, "Steps between two grids of samples; 0: none.", at_least(0, MAX_INT32))
    validate_every: int = setting(
        0,
        "Steps between two validation losses of sample.average, a multiple of log_every; 0: none.",
        at_least(0, MAX_INT32),
    )
    keep_checkpoints: int = setting(3, "Newest checkpoints to keep.", at_least(1, MAX_INT32))
    keep_every: int = setting(
        0, "Steps between two checkpoints that are kept for good beside the newest; 0: none.", at_least(0, MAX_INT32)
    )
    keep_best: str = setting(
        "",
        "Score by which the best checkpoint is kept as well: fid (with evaluate.every), or validation_loss (with "
        "train.validate_every), which then are measured on saved steps; empty: none.",
    )
    max_skipped_steps: int = setting(
        10, "Steps in a row with a loss or gradient that is not finite before training stops.", at_least(0, MAX_INT32)
    )
    wandb: str = setting(
        "", "Project at Weights & Biases that metrics, grids and scores go to as well (pip install wandb); empty: none."
    )
    log_json: bool = setting(False, "Print each line of metrics as JSON on stdout, and all else on stderr.")
    profile_start: int = setting(
        0, "Steps of this process before a trace for TensorBoard starts; 0: no trace.", at_least(0, MAX_INT32)
    )
    profile_steps: int = setting(5, "Steps that the trace covers.", at_least(1, 10_000))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """FID and its relatives, in --mode=evaluate and while training."""

    metrics: str = setting(
        "adm",
        "What is measured, comma separated: adm (FID, sFID, Inception Score, precision, recall), kid, fd_dinov2, "
        "lpips (its weights: config.lpips), clip_score, validation_loss (of data.validation_split).",
        Rule(
            lambda text: bool(text) and set(text.split(",")) <= set(EVALUATORS),
            f"some of {', '.join(EVALUATORS)}, comma separated",
        ),
    )
    averages: tuple[str, ...] = setting(
        (), "Averages of the weights to try, for a search of the best; empty: sample.average alone."
    )
    guidances: tuple[float, ...] = setting(
        (),
        "Scales of guidance to try, as in 1.0,1.5; empty: sample.guidance alone.",
        Rule(lambda scales: all(0 <= scale <= 1000 for scale in scales), "numbers from 0 to 1000"),
    )
    guidance_intervals: tuple[tuple[float, float], ...] = setting(
        (),
        "Intervals of guidance to try, as in (0.1,1.0),(0.2,0.9); empty: sample.guidance_interval alone.",
        Rule(lambda pairs: all(map(INTERVAL.test, pairs)), "pairs (low, high) of times within 0..1"),
    )
    steps: tuple[int, ...] = setting(
        (),
        "Numbers of steps to try, as in 25,50; empty: sample.num_steps alone.",
        Rule(lambda counts: all(isinstance(n, int) and 1 <= n <= 10_000 for n in counts), "whole numbers from 1"),
    )
    search_images: int = setting(
        10_000, "Samples of each of them; the best is measured again at sample.num_images.", at_least(2, 10_000_000)
    )
    best_by: str = setting("fid", "The score that the best has least of.", one_of(*DISTANCES))
    inception: str = setting("", "Weights: inception-2015-12-05.pt, or pt_inception-2015-12-05-6726825d.pth.")
    reference: str = setting("", "An ADM reference .npz; empty: the images of config.data.")
    samples: str = setting(
        "", "A samples.npz or a folder of images to measure; empty: config.sample's, drawn on the way."
    )
    cache: str = setting(
        "", "Folder for what is measured of references, which runs may share; empty: WORKDIR/evaluation."
    )
    num_reference: int = setting(
        0, "Images of config.data to compare with, evenly spread; 0: all.", at_least(0, MAX_INT32)
    )
    batch_size: int = setting(64, "Images that the Inception network takes at once.", at_least(1, 2**16))
    precision_recall_reference: int = setting(
        10_000, "Reference images for precision and recall, at most; 0: not measured.", at_least(0, 1_000_000)
    )
    precision_recall_samples: int = setting(
        50_000, "Samples for precision and recall, at most; 0: not measured.", at_least(0, 1_000_000)
    )
    dinov2: str = setting("", "Of fd_dinov2: its weights, such as dinov2_vitl14_pretrain.pth.")
    dinov2_size: str = setting("L", "Their size; published scores are of L.", one_of("S", "B", "L"))
    dinov2_dtype: str = setting("float32", "Precision of its computation.", PRECISION)
    clip: str = setting("", "Of clip_score: CLIP's Hugging Face folder.")
    lpips_images: int = setting(1000, "Of lpips: images of config.data that are denoised.", at_least(1, 10_000_000))
    lpips_time: float = setting(0.5, "Of lpips: the time that they are noised to.", between(0, 1))
    kid_subsets: int = setting(100, "Random subsets that KID is averaged over.", at_least(1, 100_000))
    kid_subset_size: int = setting(1000, "Images in each of them.", at_least(2, 1_000_000))
    save_every: int = setting(5000, "Images between two saves of what is measured so far.", at_least(1, MAX_INT32))
    every: int = setting(
        0, "Training steps between two quick FIDs, a multiple of train.log_every; 0: none.", at_least(0, MAX_INT32)
    )
    during_training_images: int = setting(5000, "Samples of a quick FID.", at_least(2, 10_000_000))


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Energy spectra, in --mode=spectrum."""

    checkpoints: str = setting("", "Workdirs or checkpoints to compare, comma separated; empty: this workdir's newest.")
    num_images: int = setting(64, "Images to draw and measure.", at_least(1, 1_000_000))
    batch_size: int = setting(
        8, "Images at once; their states at all sampling steps are held in memory.", at_least(1, 2**16)
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """The page that --mode=report writes."""

    workdirs: str = setting("", "Runs to show side by side, comma separated; empty: this workdir.")
    grids: int = setting(12, "Sample grids of a run over time, evenly spread, at most.", at_least(1, 10_000))
    grid_pixels: int = setting(768, "Longer side of an embedded grid in pixels, at most.", at_least(64, 16_384))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Timing, in --mode=benchmark."""

    warmup: int = setting(3, "Runs before the timed ones.", at_least(1, 1_000_000))
    repeats: int = setting(20, "Timed runs.", at_least(1, 1_000_000))
    parts: str = setting(
        "train,forward,sample,input",
        "What to time, comma separated: train, forward, sample, input, inception; torch: input by PyTorch as well.",
        Rule(
            lambda text: (
                bool(text) and set(text.split(",")) <= {"train", "forward", "sample", "input", "inception", "torch"}
            ),
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
# The section "model" has the settings of the model that its "name" names.
MODEL: dict[str, dict[str, Setting]] = {
    name: {
        "name": Setting((str,), name, "The network.", one_of(*MODEL_SETTINGS), False, "", lambda value: value),
        **settings(section),
    }
    for name, section in MODEL_SETTINGS.items()
}
# Settings of a model that say how it is computed: its parameters are the same whatever they are.
COMPUTED = tuple(
    dict.fromkeys(name for section in MODEL.values() for name, declared in section.items() if declared.computed)
)
