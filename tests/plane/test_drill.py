"Ten rounds of the drill; `make drill` runs 200"
from drill_plane import drill


def test_ten_kills_lose_nothing(tmp_path):
    seen = drill(10, tmp_path)
    assert sum(seen[k] for k in ('gateway', 'engine', 'trainer')) == 10 and seen['answers'] > 10 and seen['groups']
