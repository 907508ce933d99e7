"""The drawn scenes are fixed: the task of the demonstration cannot get easier unnoticed."""

from query_detr.data.shapes import ShapesDataset, fingerprint

VALIDATION_SCENES = "cc6ec9fbdd141e7050c3f38f29c446c1f6cc4ab9e6ce0e9a0e4eff1fe696e47c"


def test_the_200_validation_scenes_are_the_ones_that_were_agreed_on():
    scenes = ShapesDataset(200, seed=0)
    assert fingerprint(scenes.scene(i) for i in range(200)) == VALIDATION_SCENES
