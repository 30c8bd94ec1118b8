"A network with a branch for each window, in the rooms where networks are used: saliency, prediction, export, checkpoints, training."
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file

from ctbm import checkpoints, explain, export, learning, models, patient, pooling
from ctbm.recipes import Stage

PIXELS = torch.randint(0, 256, (3, 3, 128, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = PIXELS.float() / 255
SELECTOR = dict(backbone="test_efficientnet", in_chans=3)
HOW = pytest.mark.parametrize("how", ["separate", "shared"])


def network(how, backbone="resnet10t", **more):
    "Random, but with the running statistics of images."
    torch.manual_seed(0)
    made = models.create_model(backbone, 3, **{"weights": "none", "hidden": 8, "branches": how} | more)
    norms = [module for module in made.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in norms: module.momentum = 1.0
    with torch.no_grad(): made.train()(IMAGES)
    for module in norms: module.momentum = 0.1
    return made.eval()


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


SOME = pytest.mark.parametrize(("how", "backbone"), [("shared", "siamese_branch"), ("separate", "test_efficientnet")])


@SOME
def test_every_saliency_method_runs(how, backbone):
    made = network(how, backbone)
    for method in explain.METHODS:
        found = explain.saliency(method, made, PIXELS.numpy())
        assert found.shape == (3, 128, 128) and found.max() > 0, method
        torch.testing.assert_close(explain.saliency(method, made, PIXELS[1:2].numpy())[0], found[1], rtol=1e-3, atol=1e-5)


def test_a_branch_without_maps_is_told_of():
    made = models.create_model("vit_tiny_patch16_224", 3, "none", size=64, branches="separate")
    with pytest.raises(ValueError, match="that of 'vit_tiny_patch16_224' has the shape"):
        explain.saliency("grad_cam", made, PIXELS[:1, :, :64, :64].numpy())


@HOW
def test_the_answers_of_prediction_are_one_answer(how):
    made = network(how, pooling="attention")
    with torch.no_grad():
        logit, (slice_logit, look), (again, embedding) = made(IMAGES)[:, 0], models.answer(made, IMAGES), patient.embedded(made, IMAGES)
        third, same_look, same_embedding = patient.answer(made, IMAGES)
    for each in (slice_logit, again, third): torch.testing.assert_close(each, logit)
    torch.testing.assert_close(same_embedding, embedding)
    assert torch.equal(look, same_look) and look.shape == (3, 3 * 64) and embedding.shape == (3, 3 * 512)


@SOME
def test_exported_forms_answer_for_any_number_of_slices(how, backbone, tmp_path):
    graph = export.BagGraph(network(how, backbone, pooling="attention").requires_grad_(False))
    with export.quiet():
        free = ({0: torch.export.Dim("n")},)
        program = torch.export.export(graph, (torch.zeros_like(PIXELS[:2]),), dynamic_shapes=free)
        forms = [program.module()]
        if how == "shared":
            torch.onnx.export(program, input_names=["images"], verbose=False).save(tmp_path / "model.onnx")
            session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
            forms.append(lambda some: session.run(None, {"images": some.numpy()}))
    for some in (PIXELS, PIXELS[:1]):
        told = graph(some)
        for other in (form(some) for form in forms):
            for a, b in zip(told, other, strict=True): np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


@HOW
def test_a_checkpoint_gives_back_branches_pooling_and_chooser(how, tmp_path):
    added = dict(pooling="attention", top_k=5, selector=SELECTOR)
    donor = network(how, "test_efficientnet", **added)
    row = dict(val_f1=0.5, val_recall=1, val_specificity=0, val_accuracy=0.5, train_loss=1, val_loss=1, threshold=0.5, val_separation=0)
    optimizer = torch.optim.Adam(p for p in donor.parameters() if p.requires_grad)
    file, = checkpoints.write_staged(tmp_path, donor, optimizer, [row], 1, best=True, last_of_stage=False)
    build = lambda file, **more: models.create_model("test_efficientnet", 3, str(file), **{"hidden": 8, "branches": how} | added | more)
    loaded = build("none")
    assert checkpoints.load_checkpoint(loaded, file) == 1 and same(donor, loaded) and same(donor, build(file))
    other = "shared" if how == "separate" else "separate"
    for wrong in (dict(branches=other), dict(branches="none"), dict(hidden=0), dict(pooling="max"), dict(top_k=None, selector=None),
                  dict(selector=None), dict(selector=SELECTOR | {"in_chans": 1})):
        with pytest.raises(ValueError, match="does not fit"): build(file, **wrong)
    state = donor.state_dict()
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("chooser.")}, tmp_path / "untaught.safetensors")
    assert torch.equal(build(tmp_path / "untaught.safetensors").classifier[3].weight, donor.classifier[3].weight)
    for changed in ({k: v for k, v in state.items() if k != "branches.0.bn1.weight"}, state | {"branches.9.weight": torch.zeros(1)},
                    state | {"other": torch.zeros(1)}):
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match="does not fit"): build(tmp_path / "changed.safetensors")


@HOW
def test_pretrained_weights_start_every_branch_summed_over_the_colours(how, tmp_path):
    donor = network("none", hidden=0)
    save_file(donor.state_dict(), tmp_path / "donor.safetensors")
    made = models.create_model("resnet10t", 3, str(tmp_path / "donor.safetensors"), branches=how).eval()
    with torch.no_grad():
        for window, part in enumerate(made.forward_head(made.forward_features(IMAGES), pre_logits=True).chunk(3, 1)):
            grey = IMAGES[:, [window]].expand(-1, 3, -1, -1)
            expected = donor.forward_head(donor.forward_features(grey), pre_logits=True)
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)
    assert len({id(p) for p in made.parameters()}) == len(list(made.parameters()))
    mean, std = (sum(donor.pretrained_cfg[key]) / 3 for key in ("mean", "std"))
    torch.testing.assert_close(models.normalise(IMAGES, made), (IMAGES - mean) / std)
    with pytest.raises(ValueError, match="does not fit"):
        models.create_model("resnet18", 3, str(tmp_path / "donor.safetensors"), branches=how)


def test_random_branches_start_apart():
    first, second, third = network("separate").branches
    assert not same(first, second) and not same(second, third)


@HOW
@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_a_stage_trains_what_it_says_and_nothing_of_the_choice(how, which):
    made = network(how, dropout_p=0.2, pooling="attention", top_k=5, selector=SELECTOR)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    optimizer = torch.optim.SGD(models.freeze(made, which), lr=0.1)
    models.train_unfrozen(made)
    logits, embedding = patient.embedded(made, IMAGES)
    pooling.pooled(made.pooling, logits, embedding, torch.tensor([1, 2]), made.classifier).sum().backward()
    optimizer.step()
    moved = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    stages = {name.split(".")[2] for name in moved if name.startswith("branches.")}
    every = {name.partition(".")[0] for name, _ in made.branches[0].named_parameters()}
    assert stages == {0: set(), 1: {"layer4"}, 2: {"layer3", "layer4"}, None: every}[which]
    assert not any(name.startswith("chooser.") for name in moved) and not made.chooser.training
    roots = {name.split(".")[1] for name in moved if name.startswith("branches.")}
    assert roots == (set() if which == 0 else {str(i) for i in range(len(made.branches))})


def test_more_stages_than_a_branch_has_are_refused():
    with pytest.raises(ValueError, match=r"9 feature stages asked for; the network has 4.*Name modules instead, of \['branches'"):
        models.trainable_parameters(network("separate"), 9)
    with pytest.raises(ValueError, match="no module 'chooser'"):
        models.trainable_parameters(network("shared", top_k=5, selector=SELECTOR), ("chooser",))


def test_a_stage_learns_at_the_same_rate_in_every_branch():
    made = network("separate")
    stage = Stage("all", 1, 1e-3, 0.0, 1, None, lr_body=(4e-4, 3e-4, 2e-4, 1e-4, 5e-5))
    groups = learning.rated(made, stage)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    told = [{name: rate[id(p)] for name, p in branch.named_parameters()} for branch in made.branches]
    assert told[0] == told[1] == told[2] and set(told[0].values()) == {4e-4, 3e-4, 2e-4, 1e-4, 5e-5}


@SOME
def test_saving_memory_changes_no_result(how, backbone):
    gradients, states = [], []
    for saving in (False, True):
        made = network(how, backbone, dropout_p=0.3, top_k=5, selector=SELECTOR)
        if saving: models.save_memory(made)
        models.freeze(made, None)
        models.train_unfrozen(made)
        torch.manual_seed(1)
        made(IMAGES).sum().backward()
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.requires_grad})
        states.append(made.state_dict())
    for pair in (gradients, states):
        for name, tensor in pair[0].items(): torch.testing.assert_close(pair[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_the_published_dropout_is_inside_the_branch():
    with torch.device("meta"):
        made = models.create_model("siamese_branch", 3, "none", dropout_p=0.2, hidden=512, branches="separate")
    assert [m.p for m in made.branches.modules() if isinstance(m, torch.nn.Dropout)] == [0.2] * 9 and made.classifier[2].p == 0


def test_timm_s_own_factory_knows_the_branch():
    made = timm.create_model("siamese_branch", in_chans=2).eval()
    assert made(torch.rand(1, 2, 64, 64)).shape == (1, 1000)
    with pytest.raises(FileNotFoundError, match="no pretrained weights for 'siamese_branch'"):
        models.find_weights("siamese_branch", "imagenet")
    with pytest.raises(ValueError, match="give top_k, too"): models.create_model("resnet10t", weights="none", selector=SELECTOR)
