"""accelerate, lightning and transformers train with onepass as with torch.optim: same losses, same
checkpoints."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.small_training import CLOSE, make_data, make_model, weights
from torch.utils.data import DataLoader

import onepass

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.usefixtures("no_warning_of_ours"),
    # The frameworks' own: deprecations, missing workers, small data.
    pytest.mark.filterwarnings("ignore"),
]
OPTIMIZERS = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.05, "momentum": 0.9}),
        ("Adam", {"lr": 0.02}),
        ("AdamW", {"lr": 0.02, "amsgrad": True}),
    ],
    ids=["sgd", "adam", "adamw"],
)


# accelerate


def accelerated(library, name, options, folder=None, epochs=3, resume=False):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    opt = getattr(library, name)(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 8, 0.5)
    model, opt, loader, schedule = accelerator.prepare(
        model, opt, DataLoader(make_data(), 8), schedule
    )
    if resume:
        accelerator.load_state(str(folder))
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
            losses.append(loss.item())
    if folder is not None and not resume:
        accelerator.save_state(str(folder))
    return losses, weights(model)


@OPTIMIZERS
def test_accelerate(name, options):
    ours, theirs = (accelerated(library, name, options) for library in (onepass, torch.optim))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@OPTIMIZERS
def test_accelerate_saves_and_resumes(name, options, tmp_path):
    whole = accelerated(onepass, name, options, epochs=4)
    first = accelerated(onepass, name, options, tmp_path, epochs=2)
    second = accelerated(onepass, name, options, tmp_path, epochs=2, resume=True)
    assert first[0] + second[0] == whole[0]
    torch.testing.assert_close(second[1], whole[1], rtol=0, atol=0)


def test_accelerate_loads_torchs_checkpoint(tmp_path):
    options = {"lr": 0.02}
    whole = accelerated(torch.optim, "AdamW", options, epochs=4)
    accelerated(torch.optim, "AdamW", options, tmp_path, epochs=2)
    second = accelerated(onepass, "AdamW", options, tmp_path, epochs=2, resume=True)
    torch.testing.assert_close(second[1], whole[1], **CLOSE)


# lightning


def make_lightning_model(library, name, options, **more):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_model()
            self.losses = []

        def training_step(self, batch, _):
            x, y = batch
            loss = (self.net(x) - y).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            opt = getattr(library, name)(self.parameters(), **options)
            schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=100)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def lightning_fit(library, name, options, folder, epochs, checkpoint=None, **trainer_options):
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **trainer_options,
    )
    module = make_lightning_model(library, name, options)
    trainer.fit(module, DataLoader(make_data(), 8), ckpt_path=checkpoint)
    path = folder / f"{library.__name__}-{epochs}.ckpt"
    trainer.save_checkpoint(path)
    return module.losses, weights(module), path


@OPTIMIZERS
@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
)
def test_lightning(name, options, clip, tmp_path):
    ours, theirs = (
        lightning_fit(library, name, options, tmp_path, 2, **clip)
        for library in (onepass, torch.optim)
    )
    torch.testing.assert_close(ours[:2], theirs[:2], **CLOSE)


def test_lightning_clips_gradients_that_a_step_could_unscale(tmp_path):
    """For torch's fused optimizers it refuses to, as they say of themselves that they unscale."""
    from lightning.pytorch.plugins import MixedPrecision

    def fit(library, **options):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 0.1}
        return lightning_fit(library, "AdamW", {"lr": 0.02, **options}, tmp_path, 2, **how)

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(torch.optim, fused=True)
    ours, theirs = fit(onepass, fused=True), fit(torch.optim)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-2, atol=1e-3)


@OPTIMIZERS
def test_lightning_resumes(name, options, tmp_path):
    whole = lightning_fit(onepass, name, options, tmp_path, 4)
    _, _, path = lightning_fit(onepass, name, options, tmp_path, 2)
    second = lightning_fit(onepass, name, options, tmp_path, 4, path)
    assert second[0] == whole[0][-len(second[0]) :]
    torch.testing.assert_close(second[1], whole[1], rtol=0, atol=0)


def test_lightning_manual_optimization(tmp_path):
    import lightning

    def run(library):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = make_model()
                self.automatic_optimization = False

            def training_step(self, batch, _):
                for opt in self.optimizers():
                    opt.zero_grad()
                    loss = (self.net(batch[0]) - batch[1]).square().mean()
                    self.manual_backward(loss)
                    self.clip_gradients(opt, 0.5, "norm")
                    opt.step()

            def configure_optimizers(self):
                return library.AdamW(self.net[0].parameters(), 0.02), library.SGD(
                    self.net[2].parameters(), 0.02
                )

        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        module = Module()
        trainer.fit(module, DataLoader(make_data(), 8))
        return weights(module)

    torch.testing.assert_close(run(onepass), run(torch.optim), **CLOSE)


@OPTIMIZERS
def test_fabric(name, options, tmp_path):
    import lightning

    def run(library):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = make_model()
        opt = getattr(library, name)(model.parameters(), **options)
        model, wrapped = fabric.setup(model, opt)
        assert isinstance(wrapped, torch.optim.Optimizer)
        assert type(wrapped).__name__ == f"Fabric{name}"
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, 20)
        loader = fabric.setup_dataloaders(DataLoader(make_data(), 8))
        for epoch in range(3):
            for x, y in loader:
                wrapped.zero_grad()
                fabric.backward((model(x) - y).square().mean())
                fabric.clip_gradients(model, wrapped, max_norm=1.0)
                wrapped.step()
                schedule.step()
            if epoch == 0:
                path = tmp_path / f"{library.__name__}.ckpt"
                fabric.save(path, {"model": model, "opt": wrapped})
                fabric.load(path, {"model": model, "opt": wrapped})
        return weights(model)

    torch.testing.assert_close(run(onepass), run(torch.optim), **CLOSE)


# transformers


def hugging_trainer(library, name, options, folder, how, steps=8, resume=False):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(config)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (32, 12), generator=random)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=4,
        save_strategy="steps",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=1.0,
        seed=3,
    )
    if how == "optimizers":
        opt = getattr(library, name)(model.parameters(), **options)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 8)
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, optimizers=(opt, schedule)
        )
    else:
        pair = (getattr(library, name), options)
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, optimizer_cls_and_kwargs=pair
        )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, weights(model)


@OPTIMIZERS
@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_transformers(name, options, how, tmp_path):
    # Attention's key biases have no gradient but noise, which a small eps would blow up to full
    # steps.
    options = options if name == "SGD" else options | {"eps": 1e-3}
    ours, theirs = (
        hugging_trainer(library, name, options, tmp_path / library.__name__, how)
        for library in (onepass, torch.optim)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_transformers_resumes(tmp_path):
    options = {"lr": 0.01}
    whole = hugging_trainer(onepass, "AdamW", options, tmp_path, "optimizers")
    for last in tmp_path.glob("checkpoint-8"):
        last.rename(tmp_path / "whole")
    resumed = hugging_trainer(onepass, "AdamW", options, tmp_path, "optimizers", resume=True)
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=0)


def test_deepcopy_of_what_frameworks_hold():
    """An average of a model's weights is a deep copy of the model, beside the same optimizer."""
    model = make_model()
    opt = onepass.AdamW(model.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        opt.step()
        averaged.update_parameters(model)
    assert copy.deepcopy((model, opt, averaged))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


# Schedulers: ours where the runs above have torch's.

SCHEDULERS = ("StepLR", "OneCycleLR", "LinearLR", "CosineAnnealingLR")


@pytest.mark.parametrize("run", ["accelerate", "lightning", "transformers"])
def test_schedulers(run, tmp_path, monkeypatch):
    def trained():
        options = {"lr": 0.02}
        if run == "accelerate":
            return accelerated(onepass, "AdamW", options)
        if run == "lightning":
            return lightning_fit(onepass, "AdamW", options, tmp_path, 2)[:2]
        return hugging_trainer(onepass, "AdamW", options, tmp_path, "optimizers")

    theirs = trained()
    for name in SCHEDULERS:
        monkeypatch.setattr(torch.optim.lr_scheduler, name, getattr(onepass.lr_scheduler, name))
    torch.testing.assert_close(trained(), theirs, **CLOSE)


@pytest.mark.parametrize("run", ["accelerate", "lightning", "transformers"])
def test_schedulers_resume(run, tmp_path, monkeypatch):
    for name in SCHEDULERS:
        monkeypatch.setattr(torch.optim.lr_scheduler, name, getattr(onepass.lr_scheduler, name))
    {
        "accelerate": lambda: test_accelerate_saves_and_resumes("AdamW", {"lr": 0.02}, tmp_path),
        "lightning": lambda: test_lightning_resumes("AdamW", {"lr": 0.02}, tmp_path),
        "transformers": lambda: test_transformers_resumes(tmp_path),
    }[run]()


@pytest.mark.parametrize("kind", ["plateau", "schedule"])
def test_lightning_steps_ours(kind, tmp_path):
    """A metric is handed to ReduceLROnPlateau, whose class Lightning asks for; `onepass.Scheduler`
    steps as others."""
    import lightning

    rates = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def training_step(self, batch, _):
            rates.append(self.optimizers().param_groups[0]["lr"])
            self.log("metric", 1.0)
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            opt = onepass.AdamW(self.parameters(), lr=0.08)
            if kind == "plateau":
                schedule = onepass.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
                return {
                    "optimizer": opt,
                    "lr_scheduler": {"scheduler": schedule, "monitor": "metric"},
                }
            schedule = onepass.Scheduler(opt, {"lr": onepass.schedule.linear(0.08, 0.0, steps=4)})
            return [opt], [schedule]

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), DataLoader(make_data(), 64))
    assert rates == pytest.approx(
        [0.08, 0.08, 0.04, 0.02] if kind == "plateau" else [0.08, 0.06, 0.04, 0.02]
    )
