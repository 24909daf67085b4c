"""Entries of the workloads that compare optimizers and training methods."""

from __future__ import annotations

from typing import Any

from methodbench.entries import Axis, Metric, Resources, Task


def _nonconvex(function: str, summary: str) -> Task:
    return Task(
        name=f"nonconvex-{function}",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.nonconvex:NonConvex",
        summary=summary,
        metrics=(
            Metric(name="final-gap", direction="lower", title="gap to the global minimum", primary=True),
            Metric(name="global-share", direction="higher", title="starts that end at the global minimum"),
            Metric(
                name="start-gap",
                direction="lower",
                title="gap to the global minimum from the paper's start",
                aggregate="single",
            ),
        ),
        protocol=1,
        options={"function": function},
        axes=(Axis(series="trajectory"),),
        threads=1,
        extra="optim",
    )


#: Where the loop looks at data that is held out.
_LOOKS = (Axis(series="validation-loss", every="evaluate_every", last="steps"),)

#: What the workloads that train on data have in common.
_TRAINED = (
    Metric(name="validation-loss", direction="lower", unit="nats", aggregate="single"),
    Metric(name="steps-to-target", direction="lower", unit="steps", aggregate="single"),
)
_CLASSIFIED = (
    Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
    Metric(name="test-accuracy", direction="higher"),
    *_TRAINED,
)


def _surface(name: str, summary: str, **options: Any) -> Task:
    return Task(
        name=name,
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.surfaces:Surface",
        summary=summary,
        metrics=(
            Metric(name="log-gap", direction="lower", title="log10 of the gap to the minimum", primary=True),
            Metric(
                name="distance", direction="lower", title="distance from the minimizer", aggregate="median"
            ),
            Metric(name="steps-to-target", direction="lower", unit="steps", aggregate="median"),
        ),
        protocol=1,
        options=options,
        axes=(Axis(series="gap"),),
        threads=1,
        extra="optim",
    )


def _digits(architecture: str, steps: int, trials: int, summary: str) -> Task:
    return Task(
        name=f"digits-{architecture}",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.digits:Digits",
        summary=summary,
        metrics=_CLASSIFIED,
        protocol=2,
        data="builtin:scikit-learn/digits",
        options={"architecture": architecture, "steps": steps, "trials": trials},
        threads=1,
        axes=_LOOKS,
        tuned_by="validation-loss",
        extra="optim",
    )


def _characters(name: str, text: str, data: str, summary: str, **options: Any) -> Task:
    return Task(
        name=name,
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.characters:Characters",
        summary=summary,
        metrics=(
            Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
            *_TRAINED,
        ),
        protocol=1,
        data=data,
        options={"text": text, **options},
        threads=1,
        axes=_LOOKS,
        tuned_by="validation-loss",
        extra="optim",
    )


def _pictures(name: str, summary: str, *, kinds: tuple[str, ...] = ("training",), **options: Any) -> Task:
    cifar10 = options.get("data") == "cifar10"
    return Task(
        name=name,
        kinds=kinds,
        impl="methodbench_optim.workloads.pictures:TrainPictures",
        summary=summary,
        metrics=_CLASSIFIED,
        protocol=1,
        data="file:{data}/cifar10/train.parquet" if cifar10 else "builtin:scikit-learn/digits",
        options=options,
        threads=1,
        axes=(*_LOOKS, Axis(series="validation-accuracy", every="evaluate_every", last="steps")),
        tuned_by="validation-loss",
        extra="vision" if cifar10 else "optim",
    )


def _adaptation(name: str, summary: str, **options: Any) -> Task:
    return Task(
        name=name,
        kinds=("training",),
        impl="methodbench_optim.workloads.adaptation:Adaptation",
        summary=summary,
        metrics=(
            Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
            Metric(name="test-accuracy", direction="higher"),
            Metric(name="general-accuracy", direction="higher", title="accuracy on pictures as they were"),
            Metric(name="validation-loss", direction="lower", unit="nats", aggregate="single"),
        ),
        protocol=1,
        data="builtin:scikit-learn/digits",
        options=options,
        threads=1,
        axes=_LOOKS,
        tuned_by="validation-loss",
        extra="optim",
    )


#: What is scored of language models that are fine-tuned.
_FINE_TUNED = (
    Metric(name="general-nll", direction="lower", unit="nats", title="loss on general text"),
    Metric(name="forgetting", direction="lower", unit="nats", title="rise of the loss on general text"),
    Metric(name="validation-loss", direction="lower", unit="nats", aggregate="single"),
)


def _finetuning(name: str, data: str, summary: str, **options: Any) -> Task:
    return Task(
        name=name,
        kinds=("training",),
        impl="methodbench_optim.workloads.finetuning:FineTuneText",
        summary=summary,
        metrics=(
            Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
            Metric(name="test-accuracy", direction="higher"),
            *_FINE_TUNED,
        ),
        protocol=1,
        data=data,
        options=options,
        threads=1,
        axes=_LOOKS,
        tuned_by="validation-loss",
        extra="optim",
    )


TASKS: tuple[Task, ...] = (
    _nonconvex(
        "f1", "Two parabolas, the shallower one on the far side of zero; 300 iterates from 21 starts."
    ),
    _nonconvex(
        "f2",
        "A steep wall, then waves on a cubic with a narrow global valley; 300 iterates from 21 starts.",
    ),
    _nonconvex("f3", "A sharp valley between two ridges; 300 iterates from 21 starts."),
    _surface(
        "rosenbrock",
        "A curved valley in the plane; 500 steps from 11 starts, gradients clipped to norm 1.",
        function="rosenbrock",
    ),
    _surface(
        "rastrigin",
        "A bowl full of dents in the plane; 500 steps from 11 starts, gradients clipped to norm 1.",
        function="rastrigin",
    ),
    _surface(
        "quadratic",
        "Quadratics in 32 variables of condition 1000 in random bases; 500 steps on 11 of them.",
        function="quadratic",
    ),
    Task(
        name="logistic",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.logistic:Logistic",
        summary="Multinomial logistic regression on heavy-tailed features of unequal scale; 500 steps.",
        metrics=_CLASSIFIED,
        protocol=1,
        threads=1,
        axes=_LOOKS,
        tuned_by="validation-loss",
        extra="optim",
    ),
    _digits(
        "mlp",
        400,
        5,
        "A small MLP on scikit-learn's digits; five learning rates, chosen by validation loss.",
    ),
    _digits(
        "cnn",
        250,
        5,
        "A small CNN on scikit-learn's digits; five learning rates, chosen by validation loss.",
    ),
    _digits("vit", 300, 1, "A small vision transformer on scikit-learn's digits; 300 steps as configured."),
    _characters(
        "char-transformer",
        "pydoc",
        "builtin:pydoc_data/topics",
        "A decoder of two blocks on the characters of Python's language reference; 300 steps.",
    ),
    _characters(
        "char-transformer-shakespeare",
        "shakespeare",
        "file:{data}/tinyshakespeare/input.txt",
        "A decoder of two blocks on the characters of Shakespeare's plays; 300 steps.",
    ),
    Task(
        name="small-scale-proxies",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.proxies:SmallScaleProxies",
        summary="What a small transformer loses over seven learning rates: does the optimizer need the right one?",
        metrics=(
            Metric(
                name="lr-sensitivity",
                direction="lower",
                unit="nats",
                title="learning-rate sensitivity",
                aggregate="single",
                primary=True,
            ),
            Metric(name="best-loss", direction="lower", unit="nats", aggregate="single"),
            Metric(
                name="largest-stable-lr",
                direction="higher",
                title="largest stable learning rate",
                aggregate="single",
            ),
        ),
        protocol=1,
        data="builtin:pydoc_data/topics",
        axes=tuple(
            Axis(series=name, at="rates", label="learning rate")
            for name in ("final-loss", "attention-logit", "log-normalizer")
        ),
        threads=1,
        extra="optim",
    ),
    Task(
        name="sgd-noise-regimes",
        kinds=("optimizer",),
        impl="methodbench_optim.workloads.noise:NoiseRegimes",
        summary="A perceptron trained to zero hinge loss at six temperatures, learning rate over batch size.",
        metrics=(
            Metric(name="test-error", direction="lower", primary=True),
            Metric(
                name="converged-share", direction="higher", title="temperatures at which the training ends"
            ),
        ),
        protocol=1,
        axes=tuple(
            Axis(series=name, at="temperatures", label="temperature")
            for name in ("weight-change", "training-time", "steps")
        ),
        threads=1,
        extra="optim",
    ),
    _pictures(
        "digits-training",
        "A small MLP on scikit-learn's digits by AdamW, 3,000 steps, under a method of training.",
        architecture="mlp",
        steps=3000,
        lr=3e-3,
        evaluate_every=50,
    ),
    _pictures(
        "digits-contrast",
        "A small MLP on digits of contrasts between 0.18 and 5.6 times their own, by SGD with momentum; 400 steps.",
        architecture="mlp",
        contrast=1.5,
        optimizer="sgdm",
        lr=0.03,
        weight_decay=5e-4,
    ),
    _pictures(
        "digits-cycles",
        "A small MLP on digits by SGD at a constant rate, 2,200 steps: for methods that prune in cycles.",
        architecture="mlp",
        steps=2200,
        optimizer="sgdm",
        lr=0.05,
        weight_decay=0.0,
        decay="constant",
        evaluate_every=100,
    ),
    _pictures(
        "cifar10-resnet20",
        "ResNet-20 on 4,000 pictures of CIFAR-10, 200 steps; for methods of training by SGD with momentum.",
        kinds=("optimizer", "training"),
        data="cifar10",
        architecture="resnet20",
        steps=200,
        optimizer="sgdm",
        lr=0.08,
        weight_decay=5e-4,
        evaluate_every=25,
        target_accuracy=0.4,
    ),
    _pictures(
        "cifar10-vit-tiny",
        "ViT-Tiny on 4,000 pictures of CIFAR-10, 40 steps; for methods of training by AdamW.",
        kinds=("optimizer", "training"),
        data="cifar10",
        architecture="vit-tiny",
        steps=40,
        lr=5e-4,
        weight_decay=0.05,
        evaluate_every=20,
        target_accuracy=0.25,
        test_pictures=200,
        batch_size=32,
    ),
    _adaptation(
        "digits-adaptation",
        "A network of digits fine-tuned on 100 negatives of them: what it learns, and what it forgets.",
    ),
    _adaptation(
        "digits-composition",
        "A network of digits adapted to turned ones and negatives, 100 of each, with an expert for either.",
        domains=("turned", "negative"),
        experts=("turned", "negative"),
        lr=1e-2,
    ),
    _finetuning(
        "char-finetune",
        "builtin:pydoc_data/topics",
        "A small language model of Python's reference fine-tuned on Python programs; 300 steps.",
    ),
    _finetuning(
        "char-finetune-noisy",
        "builtin:pydoc_data/topics",
        "The same with a fifth of the labels drawn at random; scored on clean text.",
        noise=0.2,
    ),
    _finetuning(
        "char-finetune-relu",
        "builtin:pydoc_data/topics",
        "The same with ReLUs, whose outputs can be zero.",
        relu=True,
    ),
    _finetuning(
        "char-finetune-shakespeare",
        "file:{data}/tinyshakespeare/input.txt",
        "A small language model of Python's reference fine-tuned on Shakespeare's plays; 300 steps.",
        text="shakespeare",
    ),
    Task(
        name="lm-finetune",
        kinds=("optimizer", "training"),
        accepts=("causal-lm",),
        impl="methodbench_optim.workloads.language_model:FineTuneLanguageModel",
        summary="A pre-trained language model fine-tuned on Shakespeare's plays; 24 steps of two short sequences.",
        metrics=(
            Metric(name="test-nll", direction="lower", unit="nats", title="test loss", primary=True),
            *_FINE_TUNED,
        ),
        protocol=1,
        data="file:{data}/tinyshakespeare/input.txt",
        threads=1,
        axes=_LOOKS,
        tuned_by="validation-loss",
        extra="optim",
        resources=Resources(memory=4.0),
    ),
)
