from typing import Any

import pytest
from pydantic import ValidationError

from raysl.augment.crop import Crop
from raysl.augment.one_view import (
    ContextEncoderViews,
    FinetuneViews,
    JigsawViews,
    MAEViews,
    RotationViews,
)
from raysl.augment.ops import Blur, ColorJitter, Flip, Grey, Solarise
from raysl.augment.pairs import PairViews
from raysl.augment.pipeline import View
from raysl.augment.recipes import (
    BYOLViews,
    CustomViews,
    DINOViews,
    MoCoV1Views,
    MoCoV2Views,
    SimCLRViews,
    SwAVViews,
    VICRegViews,
    Views,
)
from raysl.config.base import Config
from raysl.config.load import validate
from raysl.config.yaml_text import parse_yaml, to_yaml
from raysl.errors import ConfigError


class _Section(Config):
    views: Views = SimCLRViews()


class TestSimCLRViews:
    def test_has_the_papers_operations_in_the_papers_order(self) -> None:
        # arXiv:2002.05709v3, appendix A: crop of 8 to 100 % with aspect 3/4 to 4/3, flip, colour
        # distortion of strength 1, blur half the time with sigma in [0.1, 2], kernel a tenth;
        # tf2/data_util.py: bicubic.
        (view,) = SimCLRViews().views()
        assert view == View(
            count=2,
            size_px=224,
            crop=Crop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
            ops=(
                Flip(prob=0.5),
                ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, prob=0.8),
                Grey(prob=0.2),
                Blur(sigma_px=(0.1, 2.0), kernel_fraction=0.1, prob=0.5),
            ),
        )

    def test_of_cifar_has_half_the_strength_and_no_blur(self) -> None:
        # Appendix B.9.
        (view,) = SimCLRViews(size_px=32, color_strength=0.5, blur_prob=0.0).views()
        assert view.size_px == 32
        assert view.ops == (
            Flip(prob=0.5),
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
            Grey(prob=0.2),
        )

    def test_every_knob_reaches_its_operation(self) -> None:
        (view,) = SimCLRViews(
            min_scale=0.3, flip_prob=0.1, color_prob=0.2, grey_prob=0.3, blur_prob=0.4
        ).views()
        assert view.crop.scale == (0.3, 1.0)
        assert [op.prob for op in view.ops] == [0.1, 0.2, 0.3, 0.4]

    def test_a_great_strength_keeps_the_hue_within_half_a_turn(self) -> None:
        (view,) = SimCLRViews(color_strength=4.0).views()
        jitter = view.ops[1]
        assert isinstance(jitter, ColorJitter)
        assert (jitter.brightness, jitter.hue) == (3.2, 0.5)


class TestMoCoV1Views:
    def test_has_the_authors_operations_in_the_authors_order(self) -> None:
        # arXiv:1911.05722v3 and main_moco.py: grey 0.2, jitter(0.4, 0.4, 0.4, 0.4) always, flip.
        (view,) = MoCoV1Views().views()
        assert view == View(
            count=2,
            size_px=224,
            crop=Crop(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),
            ops=(
                Grey(prob=0.2),
                ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, prob=1.0),
                Flip(prob=0.5),
            ),
        )


class TestMoCoV2Views:
    def test_has_the_authors_operations_in_the_authors_order(self) -> None:
        # arXiv:2003.04297v1 and main_moco.py: jitter(0.4, 0.4, 0.4, 0.1) 0.8, grey 0.2, blur, flip.
        (view,) = MoCoV2Views().views()
        assert view == View(
            count=2,
            size_px=224,
            crop=Crop(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),
            ops=(
                ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
                Grey(prob=0.2),
                Blur(sigma_px=(0.1, 2.0), kernel_fraction=None, prob=0.5),
                Flip(prob=0.5),
            ),
        )

    def test_every_knob_reaches_its_operation(self) -> None:
        (view,) = MoCoV2Views(size_px=32, min_scale=0.5, blur_prob=0.0, flip_prob=0.1).views()
        assert (view.size_px, view.crop.scale) == (32, (0.5, 1.0))
        assert [op.op for op in view.ops] == ["color_jitter", "grey", "flip"]
        assert view.ops[-1].prob == 0.1


class TestBYOLViews:
    def test_are_two_that_differ_in_blur_and_solarise(self) -> None:
        # arXiv:2006.07733v3, table 6, and byol/utils: bicubic, brightness added.
        first, second = BYOLViews().views()
        jitter = ColorJitter(
            brightness=0.4,
            brightness_kind="add",
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            prob=0.8,
        )
        shared = (Flip(prob=0.5), jitter, Grey(prob=0.2))
        crop = Crop(scale=(0.08, 1.0), interpolation="bicubic")
        assert first == View(size_px=224, crop=crop, ops=(*shared, Blur(prob=1.0)))
        assert second == View(
            size_px=224,
            crop=crop,
            ops=(*shared, Blur(prob=0.1), Solarise(threshold=128, prob=0.2)),
        )

    def test_of_cifar_are_not_blurred(self) -> None:
        first, second = BYOLViews(size_px=32, min_scale=0.2, blur_probs=(0.0, 0.0)).views()
        assert (first.size_px, first.crop.scale) == (32, (0.2, 1.0))
        assert [op.op for op in first.ops] == ["flip", "color_jitter", "grey"]
        assert [op.op for op in second.ops] == ["flip", "color_jitter", "grey", "solarise"]

    def test_of_ports_to_torchvision_multiply_the_brightness_and_resize_linearly(self) -> None:
        first, _ = BYOLViews(brightness_kind="multiply", interpolation="bilinear").views()
        assert first.crop == Crop(scale=(0.08, 1.0))
        assert first.ops[1] == ColorJitter(
            brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, prob=0.8
        )


class TestVICRegViews:
    def test_are_byols_with_the_same_probabilities_in_both(self) -> None:
        # arXiv:2105.04906v3, appendix C.1, and augmentations.py: bicubic.
        (view,) = VICRegViews().views()
        assert view == View(
            count=2,
            size_px=224,
            crop=Crop(scale=(0.08, 1.0), interpolation="bicubic"),
            ops=(
                Flip(prob=0.5),
                ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, prob=0.8),
                Grey(prob=0.2),
                Blur(kernel_fraction=None, prob=0.5),
                Solarise(threshold=128, prob=0.1),
            ),
        )

    def test_every_knob_reaches_its_operation(self) -> None:
        (view,) = VICRegViews(min_scale=0.2, blur_prob=0.3, solarise_prob=0.4).views()
        assert view.crop.scale == (0.2, 1.0)
        assert [op.prob for op in view.ops[-2:]] == [0.3, 0.4]
        (plain,) = VICRegViews(blur_prob=0.0, solarise_prob=0.0).views()
        assert [op.op for op in plain.ops] == ["flip", "color_jitter", "grey"]


class TestSwAVViews:
    def test_are_two_large_crops_and_six_small_ones_distorted_like_simclrs(self) -> None:
        # arXiv:2006.09882v5 and multicropdataset.py: areas [0.14, 1] and [0.05, 0.14], a blur
        # whose kernel of 23 pixels cuts nothing off.
        large, small = SwAVViews().views()
        assert (large.count, large.size_px, large.crop.scale) == (2, 224, (0.14, 1.0))
        assert (small.count, small.size_px, small.crop.scale) == (6, 96, (0.05, 0.14))
        (simclr,) = SimCLRViews().views()
        assert large.ops == small.ops == (*simclr.ops[:3], Blur(kernel_fraction=None, prob=0.5))

    def test_every_knob_reaches_its_view_and_small_crops_can_be_left_out(self) -> None:
        large, small = SwAVViews(
            size_px=64,
            global_scale=(0.3, 0.9),
            local_count=3,
            local_size_px=24,
            local_scale=(0.1, 0.2),
            color_strength=0.5,
            blur_prob=0.0,
        ).views()
        assert (large.count, large.size_px, large.crop.scale) == (2, 64, (0.3, 0.9))
        assert (small.count, small.size_px, small.crop.scale) == (3, 24, (0.1, 0.2))
        assert [op.op for op in small.ops] == ["flip", "color_jitter", "grey"]
        assert small.ops[1] == ColorJitter(
            brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8
        )
        assert len(SwAVViews(local_count=0).views()) == 1


class TestDINOViews:
    def test_are_two_large_crops_and_eight_small_ones(self) -> None:
        # arXiv:2104.14294v2 and main_dino.py: areas [0.4, 1] and [0.05, 0.4], blur 1, 0.1, 0.5.
        views = DINOViews().views()
        assert [(v.count, v.size_px, v.crop.scale) for v in views] == [
            (1, 224, (0.4, 1.0)),
            (1, 224, (0.4, 1.0)),
            (8, 96, (0.05, 0.4)),
        ]
        blurs = [op for view in views for op in view.ops if isinstance(op, Blur)]
        assert [blur.prob for blur in blurs] == [1.0, 0.1, 0.5]
        solarised = [any(isinstance(op, Solarise) for op in view.ops) for view in views]
        assert solarised == [False, True, False]

    def test_every_knob_reaches_its_view_and_small_crops_can_be_left_out(self) -> None:
        views = DINOViews(size_px=64, local_count=3, local_size_px=24, local_scale=(0.1, 0.2))
        assert [(v.count, v.size_px) for v in views.views()] == [(1, 64), (1, 64), (3, 24)]
        assert views.views()[2].crop.scale == (0.1, 0.2)
        assert len(DINOViews(local_count=0).views()) == 2

    def test_blur_of_each_kind_can_be_changed_or_left_out(self) -> None:
        views = DINOViews(blur_probs=(0.4, 0.0, 0.3)).views()
        found = [[op.prob for op in view.ops if isinstance(op, Blur)] for view in views]
        assert found == [[0.4], [], [0.3]]


class TestMAEViews:
    def test_is_one_crop_with_a_flip(self) -> None:
        crop = Crop(scale=(0.2, 1.0), interpolation="bicubic")  # main_pretrain.py:124
        assert MAEViews().views() == (View(crop=crop, ops=(Flip(),)),)


class TestRotationViews:
    def test_is_a_crop_of_8_percent_or_more_with_a_flip(self) -> None:
        # rotnet_8gpu_resnet.yaml and the authors' dataloader.py:105: torchvision's own, linear.
        crop = Crop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        assert RotationViews().views() == (View(crop=crop, ops=(Flip(prob=0.5),)),)

    def test_of_cifar_moves_the_image_within_a_border(self) -> None:
        # dataloader.py:152: RandomCrop(32, padding=4).
        (view,) = RotationViews(size_px=32, pad=0.125).views()
        assert (view.crop.short_side, view.crop.pad, view.crop.border) == ((1, 1), 0.125, "black")

    def test_a_crop_that_a_border_makes_senseless_is_refused(self) -> None:
        with pytest.raises(ValidationError, match=r"pad=0\.125 .* min_scale=0\.5 has no effect"):
            RotationViews(pad=0.125, min_scale=0.5)


@pytest.mark.parametrize(
    ("recipe", "interpolation"),
    [
        (SimCLRViews, "bicubic"),  # google-research/simclr, tf2/data_util.py:319
        (BYOLViews, "bicubic"),  # deepmind-research, byol/utils/dataset.py:201
        (VICRegViews, "bicubic"),  # facebookresearch/vicreg, augmentations.py:42
        (DINOViews, "bicubic"),  # facebookresearch/dino, main_dino.py:436
        (MAEViews, "bicubic"),  # facebookresearch/mae, main_pretrain.py:124
        (FinetuneViews, "bicubic"),  # SimCLR v2's, as SimCLR's
        (MoCoV1Views, "bilinear"),  # torchvision's default
        (MoCoV2Views, "bilinear"),
        (SwAVViews, "bilinear"),  # facebookresearch/swav, multicropdataset.py:42
        (RotationViews, "bilinear"),  # vissl, RandomResizedCrop without an option
        (JigsawViews, "bilinear"),
        (ContextEncoderViews, "bilinear"),
    ],
)
def test_crops_are_resized_as_in_the_authors_code(recipe: Any, interpolation: str) -> None:
    assert {view.crop.interpolation for view in recipe().views()} == {interpolation}
    other = "bilinear" if interpolation == "bicubic" else "bicubic"
    found = {view.crop.interpolation for view in recipe(interpolation=other).views()}
    assert found == {other}


class TestContextEncoderViews:
    def test_is_one_small_square_with_a_flip(self) -> None:
        # The authors' train.lua: 128 pixels out of a short side of 350.
        assert ContextEncoderViews().views() == (
            View(size_px=128, crop=Crop(short_side=(128 / 350, 128 / 350)), ops=(Flip(prob=0.5),)),
        )

    def test_every_knob_reaches_its_view(self) -> None:
        (view,) = ContextEncoderViews(size_px=32, short_side=(0.8, 1.0), antialias=False).views()
        assert view.size_px == 32
        assert (view.crop.short_side, view.crop.antialias) == ((0.8, 1.0), False)


class TestCustomViews:
    def test_are_the_kinds_as_they_stand(self) -> None:
        kinds = (View(count=2, ops=(Flip(),)), View(count=6, size_px=96))
        assert CustomViews(kinds=kinds).views() == kinds

    def test_takes_256_views_of_an_image_and_no_more(self) -> None:
        CustomViews(kinds=(View(count=250), View(count=6)))
        with pytest.raises(ValidationError, match=r"at most 256 views .* add up to 257"):
            CustomViews(kinds=(View(count=250), View(count=7)))

    def test_too_many_views_in_a_file_name_the_section(self) -> None:
        values = {"views": {"recipe": "custom", "kinds": [{"count": 200}, {"count": 57}]}}
        with pytest.raises(ConfigError, match=r"  views: at most 256 views of an image; .* 257"):
            validate(_Section, values, where="x")

    def test_takes_at_least_one_kind(self) -> None:
        with pytest.raises(ConfigError, match=r"views\.kinds: .*at least 1 item.*got \[\]"):
            validate(_Section, {"views": {"recipe": "custom", "kinds": []}}, where="x")
        with pytest.raises(ConfigError, match=r"views\.kinds: missing; it has no default"):
            validate(_Section, {"views": {"recipe": "custom"}}, where="x")

    def test_an_unknown_operation_names_its_place(self) -> None:
        kinds = [{"ops": []}, {"ops": [{"op": "flip"}, {"op": "gray"}]}]
        with pytest.raises(
            ConfigError,
            match=r"views\.kinds\.1\.ops\.1: got 'gray', allowed: .*did you mean 'grey'",
        ):
            validate(_Section, {"views": {"recipe": "custom", "kinds": kinds}}, where="x")


class TestViews:
    def test_an_unknown_recipe_names_the_nearest(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"views: got 'moco', allowed: simclr, moco_v1, .*custom; did you mean 'mo",
        ):
            validate(_Section, {"views": {"recipe": "moco"}}, where="x")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"recipe": "simclr", "color_strenght": 1}, "did you mean 'color_strength'"),
            ({"recipe": "moco_v1", "blur_prob": 1}, "views: unknown key 'blur_prob'"),
            ({"recipe": "simclr", "min_scale": 0}, r"views\.min_scale: .*greater than 0, got 0"),
            ({"recipe": "moco_v2", "size_px": 0}, r"views\.size_px: .*greater than 0, got 0"),
        ],
    )
    def test_a_bad_key_is_named(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            validate(_Section, {"views": given}, where="x")

    @pytest.mark.parametrize(
        "views",
        [
            SimCLRViews(color_strength=0.5),
            MoCoV1Views(size_px=96),
            MoCoV2Views(min_scale=0.1),
            BYOLViews(size_px=32),
            VICRegViews(blur_prob=0.1),
            SwAVViews(local_count=2),
            DINOViews(local_count=2),
            MAEViews(min_scale=0.5),
            ContextEncoderViews(short_side=(0.5, 1.0)),
            PairViews(first="sobel"),
            CustomViews(kinds=MoCoV2Views().views()),
        ],
        ids=lambda views: views.recipe,
    )
    def test_a_dump_loads_again(self, views: Any) -> None:
        section = _Section(views=views)
        values = parse_yaml(to_yaml(section.model_dump(mode="json")), where="dump")
        assert validate(_Section, values, where="dump") == section
