"""Speech emotion recognition at scale: the way of a clip, in order.

corpus      a folder, bucket or table of recordings -> a manifest, one row a file; who is trained on
            and who is tested
features    a recording -> sound without its silent ends at 16 kHz -> spectrogram, mel, MFCC
shards      the manifest -> Parquet shards of features and the outcome of every file, by Ray Data;
            and reading them back
training    shards -> tensors that stay in memory -> ResNet18 with a OneCycle learning rate, in
            plain torch -> checkpoint; Ray Train around it
inference   a checkpoint -> scores on its test part, the emotion in any audio files, a model that
            MLflow serves, or one ONNX file

Around them: `cli` and `commands` are the command line, `cluster` joins Ray, `storage` opens paths
and URIs, `tracking` records runs in MLflow and `registry` finds models, `report` draws,
`page` writes a run's page and `run_page` gathers what it shows. Imports go down this list, not up.
"""

from ser_ray.version import __version__ as __version__
