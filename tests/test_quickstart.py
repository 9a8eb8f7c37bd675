"""What `make quickstart` concludes from a table."""

from otdrg import quickstart

COLUMNS = list(quickstart.COLUMNS)


def table(model, shuffled, constant):
    rows = {"model": model, "images shuffled across studies": shuffled, "best constant report": constant}
    rows = {name: dict(zip(COLUMNS, scores, strict=True)) for name, scores in rows.items()}
    return {"studies": 9, "labeler": "rules", "rows": {**rows, "true states given": rows["model"]}}


def test_a_model_that_uses_the_image_passes(capsys):
    assert quickstart.check(table([0.5] * 4, [0.1] * 4, [0.3] * 4)) == 0
    assert "it uses the image" in capsys.readouterr().out


def test_one_figure_below_the_constant_fails(capsys):
    assert quickstart.check(table([0.5, 0.5, 0.2, 0.5], [0.1] * 4, [0.3] * 4)) == 1
    assert "does not beat the best constant report in CIDEr" in capsys.readouterr().out


def test_a_model_that_does_as_well_on_other_images_fails(capsys):
    assert quickstart.check(table([0.5] * 4, [0.4, 0.1, 0.1, 0.1], [0.3] * 4)) == 1
    assert "still beats the best constant report in BLEU-4" in capsys.readouterr().out
