"""How Alembic reaches the database: with the service's own engine and models."""

from alembic import context
from sqlalchemy import Connection

from service.store.models import Base
from service.store.session import make_engine


def run(connection: Connection) -> None:
    """Run the migrations that the command asks for in one transaction."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Connect; on SQLite without foreign keys, since rebuilding a table would delete what refers to it."""
    engine = make_engine(context.config.attributes["url"])
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.connection.cursor().execute("PRAGMA foreign_keys=OFF").close()
        run(connection)
        connection.commit()
    engine.dispose()


main()
