"""``lora-ortho merge`` on a diffusers pipeline: the same pictures by every method, in one grid."""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch

from lora_ortho.adapters import attach
from lora_ortho.merge_config import Lora, MergeConfig
from lora_ortho.messages import one_line

from .console import CliError, Progress, quieten, table, weights_text
from .merge_checks import device_of, dtype_of
from .merge_results import GRID, Made, Unfinished, folder_of

_LABEL = 22  # pixels above each row of the grid
_NARROWEST = 160  # pixels that a label needs
_GROUND, _INK = "#ffffff", "#1a1a1a"

Pictures = dict[str, list[Any]]  # PIL images by what made them


def compare(config: MergeConfig, progress: Progress) -> Made:
    """Runs the bare pipeline, each adapter alone, and every method; grid.png and every picture.

    Raises:
        CliError, ValueError: what does not fit, before anything is painted.
        Unfinished: a row failed after others were finished.
    """
    progress("loading the pipeline")
    pipe = load(config)
    options = call_options(config, pipe)
    own = [f"adapter_{j}" for j in config.on]  # PEFT allows no dot in a name
    loras, weights = config.of_on(config.loras), config.of_on(config.weights)
    for lora, name in zip(loras, own, strict=True):
        progress(f"loading {lora.adapter_name}")
        _load_lora(pipe, config, lora, name)
    p = None if config.p is None else config.of_on(config.p)
    pipe.set_adapters(own, weights)
    for method in config.methods:  # every refusal comes before the first row
        attach(pipe, p=p, method=method, backend=config.backend).detach()
    made: Pictures = {}

    def paint(key: str) -> None:
        torch.manual_seed(config.seed)  # of the masks, drawn anew at every step
        found = []
        for batch in range(config.num_batches):
            progress(f"{key}, batch {batch + 1} of {config.num_batches}")
            generator = torch.Generator().manual_seed(batch)
            found += pipe(**options, generator=generator).images
        made[key] = found

    key = "bare model"
    try:
        pipe.disable_lora()
        paint(key)
        pipe.enable_lora()
        for lora, name, weight in zip(loras, own, weights, strict=True):
            key = f"{lora.adapter_name} alone"
            pipe.set_adapters([name], [weight])
            paint(key)
        pipe.set_adapters(own, weights)
        for key in config.methods:
            with attach(pipe, p=p, method=key, backend=config.backend):
                paint(key)
    except (Exception, KeyboardInterrupt) as error:
        if not made:
            raise
        raise Unfinished(_made(config, made), key) from error
    return _made(config, made)


def _made(config: MergeConfig, pictures: Pictures) -> Made:
    result = {
        "kind": "image",
        "model": config.pipe_id,
        "adapters": config.names,
        "weights": config.weights,
        "p": config.p,
        "seed": config.seed,
        "prompt": config.prompt,
        "pictures": len(next(iter(pictures.values()))),
        "difference": differences(pictures),
    }
    return Made(result, as_text(result), lambda folder: write(folder, pictures))


def load(config: MergeConfig) -> Any:
    """The pipeline, on its device, with the scheduler that was asked for."""
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise CliError(
            f"an image pipeline needs diffusers (pip install diffusers): {error}"
        ) from error
    kind: Any = getattr(diffusers, str(config.scheduler), None)
    named = str(config.scheduler).endswith("Scheduler") and hasattr(kind, "from_config")
    if config.scheduler is not None and not named:
        raise CliError(f"scheduler: diffusers has no scheduler {config.scheduler!r}")
    pipe_id = str(config.pipe_id)
    source = str(config.local(pipe_id) or pipe_id)
    dtype = dtype_of(config, "image")
    quieten(diffusers.utils.logging, importlib.import_module("transformers").logging)
    try:
        with warnings.catch_warnings():  # newer versions call the argument dtype
            warnings.simplefilter("ignore", FutureWarning)
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
        pipe.to(device_of(config))
    except Exception as error:  # whatever the library raises for a pipeline it cannot load
        raise CliError(f"cannot load {source}: {one_line(error)}") from error
    if config.scheduler is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    if not hasattr(pipe, "load_lora_weights"):
        raise CliError(f"{type(pipe).__name__} does not load LoRA adapters")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_options(config: MergeConfig, pipe: Any) -> dict[str, Any]:
    """The arguments of a call of the pipeline; one that it does not have must not be wanted."""
    wanted = {
        "prompt": config.prompt,
        "negative_prompt": config.neg_prompt or None,
        "num_images_per_prompt": config.batch_size,
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "clip_skip": config.clip_skip,
        "width": config.width,
        "height": config.height,
    }
    has = inspect.signature(pipe.__call__).parameters
    for name in ("negative_prompt", "clip_skip", "width", "height"):  # the others have defaults
        if wanted[name] is not None and name not in has:
            raise CliError(f"{type(pipe).__name__} has no {name}: leave that key out")
    return {name: value for name, value in wanted.items() if name in has and value is not None}


def _load_lora(pipe: Any, config: MergeConfig, lora: Lora, name: str) -> None:
    path = config.adapter_path(lora)
    try:
        with warnings.catch_warnings():  # that there are several adapters is intended
            warnings.simplefilter("ignore", UserWarning)
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    except Exception as error:  # whatever the library raises for keys it does not know
        raise CliError(f"cannot load {path}: {one_line(error)}") from error
    if name not in {key for names in pipe.get_list_adapters().values() for key in names}:
        raise CliError(f"{path}: no layer of the pipeline is adapted by it")


def differences(made: Pictures) -> dict[str, dict[str, float]]:
    """Mean absolute difference of pixels, in [0, 255], of every row from bare and direct."""
    pixels = {key: [_pixels(image) for image in images] for key, images in made.items()}
    against = [key for key in ("bare model", "direct") if key in pixels]
    return {
        key: {
            other: float(
                torch.stack(
                    [(a - b).abs().mean() for a, b in zip(own, pixels[other], strict=True)]
                ).mean()
            )
            for other in against
        }
        for key, own in pixels.items()
    }


def _pixels(image: Any) -> torch.Tensor:
    data = bytearray(image.convert("RGB").tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).float()


def as_text(result: dict[str, Any]) -> str:
    """The differences as a table."""
    rows = result["difference"]
    columns = list(next(iter(rows.values())))
    weights = weights_text(result["adapters"], result["weights"])
    cells = [[key, *(f"{value[other]:.2f}" for other in columns)] for key, value in rows.items()]
    return (
        f"{result['model']} with {weights}; seed {result['seed']}\n"
        f"{result['pictures']} pictures each of {result['prompt']!r}\n\n"
        f"mean difference of a pixel, of 255\n"
        f"{table(['', *(f'from {other}' for other in columns)], cells, '  ')}"
    )


def write(folder: Path, made: Pictures) -> None:
    """grid.png, and every picture as it is in a folder for each row."""
    grid(made).save(folder / GRID)
    for key, images in made.items():
        own = folder / folder_of(key)
        own.mkdir()
        for number, image in enumerate(images):
            image.save(own / f"{number}.png")


def grid(made: Pictures) -> Any:
    """One picture of all: a row for each method, its name above."""
    from PIL import Image, ImageDraw

    first = next(iter(made.values()))
    width, height = first[0].size
    size = (max(width * len(first), _NARROWEST), (height + _LABEL) * len(made))
    picture = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(picture)
    for row, (key, images) in enumerate(made.items()):
        top = row * (height + _LABEL)
        pen.text((5, top + 4), key, fill=_INK, font_size=_LABEL - 9)
        for column, image in enumerate(images):
            picture.paste(image, (column * width, top + _LABEL))
    return picture
