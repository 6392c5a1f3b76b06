"""A tiny random Qwen3 made by transformers, and one real engine for all the tests that need one."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCAB = 128
EOS = 7


@dataclasses.dataclass
class TinyModel:
    """A Hugging Face directory, and the same model in torch, which is the reference."""

    directory: Path
    model: object

    def state(self):
        """name -> float32 torch tensor; a tied head is not listed twice."""
        tied = self.model.config.tie_word_embeddings
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }

    def expected(self):
        return [[name, "float32", list(t.shape)] for name, t in self.state().items()]

    def files(self):
        names = ("config.json", "generation_config.json")
        return {name: (self.directory / name).read_bytes() for name in names}

    def logits(self, tokens):
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].float().numpy()

    def logprobs(self, tokens, temperature=1.0):
        """Row t is the reference's distribution of the token after `tokens[: t + 1]`."""
        import torch

        return torch.log_softmax(torch.from_numpy(self.logits(tokens)) / temperature, -1).numpy()

    def scores(self, tokens):
        rows = self.logprobs(tokens)
        after = [rows[t - 1, tokens[t]] for t in range(1, len(tokens))]
        return np.array([0.0, *after], np.float32)


def make_tiny(directory: Path, seed: int, tied: bool = True, kv_heads: int = 2) -> TinyModel:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        initializer_range=0.2,  # wide, so that two seeds give visibly different distributions
    )
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return TinyModel(directory, model)


def ascii_tokenizer(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer whose tokens are the ASCII characters, but for EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A byte-level tokenizer writes the bytes that it cannot show as letters from 256 on.
    unseen = [byte for byte in range(VOCAB) if not 33 <= byte <= 126]
    letters = {
        byte: chr(256 + unseen.index(byte) if byte in unseen else byte) for byte in range(VOCAB)
    }
    letters[EOS] = "<eos>"
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny-a"), seed=0)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another set of weights for the same architecture."""
    return make_tiny(tmp_path_factory.mktemp("tiny-b"), seed=1)


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray on this machine for the whole session, or the one that is there already."""
    ray = pytest.importorskip("ray")
    mine = not ray.is_initialized()
    if mine:
        ray.init(
            address="local",  # never somebody else's cluster
            num_cpus=16,  # only counted: what matters is that nothing waits for a place
            object_store_memory=256 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    yield ray
    if mine:
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A file system on a server that speaks S3, a process of its own, and the environment that
    leads there."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with serving(tmp_path_factory, "-m", "moto.server", "-H", "127.0.0.1", "-p") as (port, patch):
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield s3fs.S3FileSystem()


@pytest.fixture(scope="session")
def gs_server(tmp_path_factory):
    """The same of Google's storage."""
    pytest.importorskip("gcp_storage_emulator")
    command = ["-m", "gcp_storage_emulator", "start", "--in-memory", "--host=127.0.0.1", "--port"]
    with serving(tmp_path_factory, *command) as (port, patch):
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        # The client would ask over gRPC, which the emulator does not speak, what kind of bucket
        # it is, and wait for a minute.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield pytest.importorskip("gcsfs").GCSFileSystem(token="anon")


@contextlib.contextmanager
def serving(tmp_path_factory, *command):
    """(port, environment to be changed) while Python runs a command whose last argument is the
    port that it listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    arguments = [sys.executable, *command, str(port)]
    server = subprocess.Popen(arguments, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            assert server.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        yield port, patch
    server.terminate()
    server.wait()


@pytest.fixture
def s3_url(s3_server):
    """In a bucket of its own."""
    bucket = f"weights-{uuid.uuid4().hex}"
    s3_server.mkdir(bucket)
    return f"s3://{bucket}/run"


@pytest.fixture
def gs_url(gs_server):
    bucket = f"weights-{uuid.uuid4().hex}"
    gs_server.mkdir(bucket)
    return f"gs://{bucket}/run"


@pytest.fixture(scope="session")
def engine_settings():
    from bridge.engines.vllm import EngineSettings

    return EngineSettings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
        load_format="dummy",
    )


def packed(model: TinyModel, version: int, leave_out=(), reshape=()):
    """A version of `model` as the trainer would pack it, optionally spoilt."""
    from bridge import wire

    tensors = []
    for name, tensor in model.state().items():
        if name not in leave_out:
            shape = (tensor.numel(),) if name in reshape else tuple(tensor.shape)
            data = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
            tensors.append(wire.HostTensor(name, "float32", shape, data))
    return wire.pack(version, tensors, bucket_bytes=1 << 16)
