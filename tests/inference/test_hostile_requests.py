"""Whatever is sent to a served model is answered, or refused as a mistake of the sender."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from ser_ray.inference import packaged
from ser_ray.tracking.run_metadata import model_signature
from tests.clips import voice, write_sound, write_wav
from tests.hostile import JSON, budgets, damaged, damaged_json, hold
from tests.models import LABELS

BODIES = ("dataframe_records", "dataframe_split", "instances", "inputs")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of MLflow and pandas, about what is sent
@budgets(60)
def test_any_request_is_answered_or_refused(
    checkpoint: Path, tmp_path: Path, examples: int
) -> None:
    import mlflow  # it warns when it is imported
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    mlflow.pyfunc.save_model(
        tmp_path / "model",
        loader_module=packaged.__name__,
        data_path=str(checkpoint),
        pip_requirements=[],
        signature=model_signature(LABELS),
    )
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    wav = write_wav(tmp_path / "clip.wav", voice(0.5))
    sounds = [
        wav.read_bytes(),
        write_sound(tmp_path / "a.mp3", voice(), "libmp3lame", "mp3").read_bytes(),
    ]
    records = [
        {"path": str(wav)},
        {"audio": base64.b64encode(sounds[0]).decode()},
        {"waveform": voice(0.25, 16_000).tolist(), "sample_rate": 16_000},
    ]
    row = st.one_of(
        st.builds(lambda data: {"audio": base64.b64encode(data).decode()}, damaged(sounds)),
        st.dictionaries(st.sampled_from(["path", "audio", "waveform", "sample_rate", "x"]), JSON),
        damaged_json(records[0]),
        damaged_json(records[2]),
        st.sampled_from(records),
    )
    split = st.fixed_dictionaries({"columns": JSON, "data": JSON})
    body = st.one_of(
        JSON,
        st.dictionaries(
            st.sampled_from(BODIES), st.lists(row, max_size=3) | JSON | split, max_size=2
        ),
        st.fixed_dictionaries({"dataframe_records": st.lists(row, min_size=1, max_size=3)}),
    )
    requests = st.one_of(
        st.tuples(st.just("application/json"), st.builds(json.dumps, body)),
        st.tuples(st.just("application/json"), st.text(max_size=50)),
        st.tuples(st.just("text/csv"), st.text(max_size=50)),
        st.tuples(st.text(max_size=20), st.just("{}")),
    )
    schema = model.metadata.get_input_schema()

    def is_answered_or_refused(request: tuple[str, str]) -> None:
        kind, text = request
        refusal = ""
        try:
            answer = scoring_server.invocations(text, kind, model, schema)
        except MlflowException as error:
            status, refusal = error.get_http_status_code(), error.serialize_as_json()
        else:
            status = answer.status
            if status == 200:
                rows = json.loads(answer.response, parse_constant=pytest.fail)["predictions"]
                assert all(item["status"] == "ok" or item["reason"] for item in rows)
        assert 200 <= status < 500
        assert "Encountered an unexpected error" not in refusal

    hold(examples, requests, is_answered_or_refused)
