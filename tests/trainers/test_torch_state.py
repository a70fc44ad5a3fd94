"""A PyTorch model and its optimizer as safetensors: training resumes to the bit, anything else is refused."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from blacksmith.errors import CheckpointError
from blacksmith.trainers.torch_state import (
    MODEL,
    NUMBERS,
    load_state,
    optimizer_state,
    save_state,
    set_learning_rate,
    slot_fits,
)

OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    # LBFGS keeps lists and is refused, see below; SparseAdam takes other gradients, Muon only matrices.
    if inspect.isclass(value) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}
CASES = {name: (name, {}) for name in OPTIMIZERS} | {
    "SGD, momentum": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "Adam, fused": ("Adam", {"fused": True}),
    "AdamW, fused, amsgrad": ("AdamW", {"fused": True, "amsgrad": True}),
    "AdamW, foreach": ("AdamW", {"foreach": True}),
    "Adagrad, fused": ("Adagrad", {"fused": True}),
    "RMSprop, centered": ("RMSprop", {"momentum": 0.9, "centered": True}),
}


class Net(nn.Module):
    """Every kind of tensor: tied, scalar, bfloat16, channels last, and integer and float buffers."""

    def __init__(self, width=6):
        super().__init__()
        self.embedding = nn.Embedding(8, width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(width)
        self.bfloat16_layer = nn.Linear(width, width, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.norm(self.convolution(self.embedding(tokens).movedim(-1, 1))).mean((2, 3))
        return self.head(torch.tanh(self.bfloat16_layer(x.bfloat16()).float()) * self.scale)


def make(seed, optimizer="AdamW", width=6, **options):
    torch.manual_seed(seed)
    model = Net(width)
    return model, getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, **options)


def train(model, optimizer, steps):
    """Steps on batches that depend on the step's number alone."""
    for step in steps:
        tokens = torch.randint(8, (4, 5, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens[:, 2, 2]).backward()
        optimizer.step()


def assert_equal(a, b):
    """Equal to the bit, in dtype and in memory layout: nested dictionaries of tensors and settings."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.device, a.stride()) == (b.dtype, b.device, b.stride())
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("case", CASES)
def test_training_resumes_bit_for_bit(tmp_path, case):
    name, options = CASES[case]
    model, optimizer = make(0, name, **options)
    train(model, optimizer, range(3))
    save_state(tmp_path, model, optimizer)
    resumed = make(1, name, **options)
    load_state(tmp_path, *resumed)
    assert_equal(resumed[1].state_dict(), optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(*resumed, range(3, 6))
    assert_equal(resumed[0].state_dict(), model.state_dict())
    assert_equal(resumed[1].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("case", ["Muon", "SparseAdam"])
def test_optimizers_for_special_gradients_resume_too(tmp_path, case):
    def start(seed):
        torch.manual_seed(seed)
        model = nn.EmbeddingBag(5, 3, sparse=case == "SparseAdam", mode="sum")
        return model, getattr(torch.optim, case)(model.parameters(), lr=0.01)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.tensor([[0, 2], [2, 4]])).square().sum().backward()
            optimizer.step()

    model, optimizer = start(0)
    steps(model, optimizer, 3)
    save_state(tmp_path, model, optimizer)
    resumed = start(1)
    load_state(tmp_path, *resumed)
    steps(model, optimizer, 2)
    steps(*resumed, 2)
    assert_equal(resumed[0].state_dict(), model.state_dict())
    assert_equal(resumed[1].state_dict(), optimizer.state_dict())


def test_slots_and_numbers_are_restored_exactly(tmp_path):
    # As an optimizer of one's own may keep them: in another dtype than the weights, or as plain numbers.
    def slots(value):
        tensors = {"master": torch.full((2, 3), value), "rows": torch.full((2, 1), value).double()}
        return tensors | {"count": int(value), "ratio": value / 3, "warm": value > 1}

    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = slots(1.7)
    save_state(tmp_path, model, optimizer)
    optimizer.state[model.weight] = slots(0.7)
    load_state(tmp_path, model, optimizer)
    assert_equal(optimizer.state[model.weight], slots(1.7))


@pytest.mark.parametrize("record", [[], {"optimizer": "SGD"}, {"optimizer": "SGD", "numbers": {"a/b": "c"}}])
def test_numbers_of_the_wrong_type_are_a_checkpoint_error(tmp_path, record):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())
    save_state(tmp_path, model, optimizer)
    (tmp_path / NUMBERS).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"optimizer\.json: .*is not valid"):
        load_state(tmp_path, model, optimizer)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model, _ = make(0)
    save_state(tmp_path, model)
    names = load_file(tmp_path / MODEL).keys()
    assert len(names & {"embedding.weight", "head.weight"}) == 1
    assert {"norm.num_batches_tracked", "scale"} < names
    other, _ = make(1)
    load_state(tmp_path, other)
    assert_equal(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embedding.weight


def test_loading_replaces_all_of_the_state(tmp_path):
    model, optimizer = make(0)
    save_state(tmp_path, model, optimizer)
    expected = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3))
    load_state(tmp_path, model, optimizer)
    assert_equal(model.state_dict(), expected)
    assert not optimizer.state


def test_a_loaded_state_does_not_depend_on_its_files(tmp_path):
    model, optimizer = make(0)
    train(model, optimizer, range(3))
    save_state(tmp_path, model, optimizer)
    resumed = make(1)
    load_state(tmp_path, *resumed)
    for file in tmp_path.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    assert_equal(resumed[0].state_dict(), model.state_dict())
    assert_equal(resumed[1].state_dict(), optimizer.state_dict())


def test_a_different_model_or_optimizer_is_refused(tmp_path):
    model, optimizer = make(0)
    train(model, optimizer, range(1))
    save_state(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match=r"size mismatch for .*"):
        load_state(tmp_path, make(0, width=7)[0])
    deeper = make(0)[0]
    deeper.more = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"more\.bias"):
        load_state(tmp_path, deeper)
    untied = make(0)[0]
    untied.head = nn.Linear(6, 8, bias=False)
    with pytest.raises(CheckpointError, match=r"Missing .*weight"):
        load_state(tmp_path, untied)
    with pytest.raises(CheckpointError, match="AdamW, not of SGD"):
        load_state(tmp_path, *make(0, "SGD"))
    part = make(0)[0]
    with pytest.raises(CheckpointError, match="does not train"):
        load_state(tmp_path, part, torch.optim.AdamW(part.norm.parameters()))


def test_state_that_cannot_be_saved_is_refused():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight])
    optimizer.state[weight] = {"old_dirs": [torch.ones(2)]}
    with pytest.raises(TypeError, match="LBFGS keeps 'old_dirs' as a list"):
        optimizer_state(optimizer, {"weight": weight})


def test_the_learning_rate_of_every_group_is_set():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": 0.5} for w in weights]
    optimizer = torch.optim.SGD(groups, lr=0.5, foreach=False)
    set_learning_rate(optimizer, 0.25)
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    assert [float(w.detach()) for w in weights] == [0.75, 0.75]


@pytest.mark.parametrize("case", CASES)
def test_slots_of_pytorchs_optimizers_fit_and_others_do_not(case):
    name, options = CASES[case]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (5,))]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.01, **options)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor):
                assert slot_fits(slot, value, parameter), slot
            assert not slot_fits(slot, torch.zeros(2), parameter)
    assert not slot_fits("exp_avg", 1.0, parameters[0])
