"""Every setting, read from `SECATEURS_*` in the environment."""

from functools import lru_cache
from pathlib import Path

from platformdirs import user_data_path
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What an operator can set; every field is `SECATEURS_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="SECATEURS_", extra="ignore")

    home: Path = Field(default_factory=lambda: user_data_path("secateurs"))
    """Where the embedded database, artifacts and logs live."""
    database_url: str | None = None
    """SQLAlchemy URL; None is SQLite in `home`. `postgresql://…` uses psycopg 3."""
    broker_url: str | None = None
    """Celery broker; None is a file system queue in `home` (`secateurs up` sets its own embedded Redis)."""
    data_root: Path | None = None
    """Datasets that users may register lie below this folder; None is `home`/data."""
    host: str = "127.0.0.1"
    port: int = 8740
    lease_seconds: float = 30.0
    """A worker that has not renewed its lease for so long has lost its job."""
    beat_seconds: float = 1.0
    reconcile_seconds: float = 5.0
    stall_seconds: float = 900.0
    """A runner without progress for so long is hung and is killed."""
    attempts: int = 3
    """Workers that a job may cost in a row, without a step done, before it fails."""
    verify_seconds: float = 86_400.0
    """How long a job waits in `verifying` for its device before it ends `unverified`."""
    profile_seconds: float = 86_400.0
    """How long a job waits in `profiling` for its device before it fails."""
    agent_lease_seconds: float = 60.0
    share_seconds: float = 3.0
    """A generation that would take one worker longer to score is offered to all in chunks."""
    linger_seconds: float = 15.0
    """How long a process that scores chunks of another worker's job waits for more of them: starting one costs about
    three."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where runners compute: `cpu`; `cuda`, a GPU for each training process; `cuda:1`, that GPU; `auto`, GPUs if there
    are enough. Only trainings from scratch have run on a GPU, once."""
    training_processes: int = Field(1, ge=1, le=64)
    """Processes of this machine that train a job's networks together, each on its part of every batch. Part of what a
    result can be reproduced with."""
    threads: int = 0
    """Torch threads of a runner; 0 is one for images of up to 64 pixels (a second one was seen to bring nothing there)
    and all cores for larger ones. Part of what a result can be reproduced with."""

    @property
    def database(self) -> str:
        """The database that is used."""
        return self.database_url or f"sqlite:///{self.home / 'secateurs.db'}"

    @property
    def data(self) -> Path:
        """The folder below which datasets may lie."""
        return self.data_root or self.home / "data"

    @property
    def blobs(self) -> Path:
        """The folder of checkpoints and artifacts; shared by all workers and the API."""
        return self.home / "blobs"


@lru_cache
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings()
