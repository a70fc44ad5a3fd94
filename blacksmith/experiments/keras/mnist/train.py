"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch: data, model, training, test."""

from blacksmith.datasets import mnist
from blacksmith.errors import ConfigError
from blacksmith.experiments.keras.mnist.configs import Config
from blacksmith.models.keras.mnist.mlp import mlp
from blacksmith.run.order import Order
from blacksmith.run.run import Run
from blacksmith.trainers.augmentation import ShiftAndRotate
from blacksmith.trainers.classification import make_task, score_classifier
from blacksmith.trainers.keras_trainer import KerasTrainer, Samples, Setup


def train(run: Run) -> int:
    """Trains the model and tests the best checkpoint; returns the exit status."""
    data = load_data(run)
    setup = prepare(run.config, data)
    trainer = KerasTrainer(run, setup)
    trainer.fit()
    return trainer.finish(
        lambda: score_classifier(trainer.backend, setup.test, data.test.images, run.directory / "images")
    )


def load_data(run: Run) -> mnist.Mnist:
    """The images that `mnist.Data` names.

    Raises:
      DataError: they are missing, broken, or not what a resumed run was trained on.
    """
    settings = run.config.data
    data = mnist.load(
        settings.source,
        settings.path,
        name=settings.name,
        validation=settings.validation,
        seed=run.config.run.seed,
    )
    run.use_data(data.info)
    return data


def prepare(config: Config, data: mnist.Mnist) -> Setup:
    """Batches, model and optimizer.

    Raises:
      ConfigError: a batch is larger than the training set.
    """
    settings, model = config.data, config.model
    train, validation, test = (
        Samples(*mnist.prepare(split, settings.scale, settings.mean, settings.std))
        for split in (data.train, data.validation, data.test)
    )
    if config.train.batch_size > len(train):
        raise ConfigError(
            f"mnist.Train.batch_size = {config.train.batch_size} is more than {len(train)} training samples"
        )
    order = Order(len(train), config.train.batch_size, config.run.seed)
    end = config.train.total_steps(order.steps_per_epoch)
    augmentation = None
    if settings.shift or settings.rotate:
        augmentation = ShiftAndRotate(
            settings.shift, settings.rotate, background=-settings.mean / settings.std
        )

    def build() -> object:
        return mlp(
            model.hidden,
            activation=model.activation,
            dropout=model.dropout,
            bias=model.bias,
            num_classes=data.info.classes,
        )

    task = make_task(config, build, end, augmentation)
    return Setup(task, order, end, train, validation, test)
