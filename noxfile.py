"""``make test-matrix``: the quick tests with the oldest and newest Python and torch, in environments of their own."""

import nox

nox.options.default_venv_backend = "uv|venv"
nox.options.reuse_venv = "yes"
nox.options.envdir = ".venv-matrix"

TESTS = (  # what depends on versions of Python, torch and the other libraries
    "tests/test_api.py",
    "tests/test_descent.py",
    "tests/test_energies.py",
    "tests/test_starts.py",
    "tests/attacks",
    "tests/cli",
    "tests/core",
    "tests/data",
    "tests/models",
    "tests/samplers",
    "tests/training",
)


@nox.session
@nox.parametrize("python,torch", [("3.10", "2.6.0"), ("3.11", "2.9.1"), ("3.12", "2.13.0"), ("3.13", "2.15.0")])
def tests(session: nox.Session, torch: str) -> None:
    """Install the package with this torch, and run the quick tests; the rest of the command line goes to pytest."""
    session.install("-e", ".[data,dev]", f"torch=={torch}")
    session.run("python", "-c", "import sys, torch; print(sys.version.split()[0], torch.__version__)")
    words = session.posargs or TESTS
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "loadfile", *words, env={"OMP_NUM_THREADS": "1"})
