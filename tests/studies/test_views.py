import pytest
from otdrg.studies.views import view_named


@pytest.mark.parametrize(
    ("text", "view"),
    [
        *((position, "frontal") for position in ("PA", "AP", "AP AXIAL", "AP LLD", "PA RLD", "ap ", "AP|Erect")),
        *((position, "lateral") for position in ("LATERAL", "LL", "RL", "XTABLE LATERAL", "Lateral")),
        ("postero-anterior", "frontal"),
        ("POSTERO_ANTERIOR", "frontal"),
        ("antero posterior", "frontal"),
        ("chest_lat", "lateral"),
        ("PA and lateral", "unknown"),
        *((position, "unknown") for position in ("", "LAO", "RAO", "LPO", "SWIMMERS", "LEFT LATERAL DECUBITUS", "nan")),
    ],
)
def test_view_named_recognises_words(text, view):
    assert view_named(text) == view
