# Every target prepares what it needs: a fresh clone needs `make demo` and nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

PEERS := .venv-agreement/.ready
RIVALS := .venv-bench/.ready
PAGE := .venv-page/.ready
ZOO := .venv-zoo/.ready

.PHONY: demo test test-all test-cpus test-matrix test-page test-zoo lint mutants recipes agreement bench gpu-check results docs clean

demo: $(READY)
	$(BIN)/advebm demo

# One process a core, with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: $(READY)
	$(PYTEST) $(ARGS)

# The long ones too: several processes, real kills, the demo.
test-all: $(READY)
	$(PYTEST) -m "" $(ARGS)

# What depends on the CPU's instructions, as on a CPU without AVX-512 and on one without AVX2.
CPUS_TESTS := tests/models tests/training tests/diagnostics/test_kernels.py tests/diagnostics/test_doctor.py
test-cpus: $(READY)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(CPUS_TESTS)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) $(CPUS_TESTS)

# The quick tests with the oldest and newest Python and torch that are supported, in environments of their own (5 GB each);
# needs python3.10 to python3.13.  ARGS="-s 'tests(python='3.10', torch='2.6.0')'" for one.
test-matrix: $(READY)
	$(BIN)/python -m nox $(ARGS)

# The page in a headless browser; needs Chromium and its driver (Debian: apt-get install chromium chromium-driver).
# ADVEBM_PICTURES=docs/pictures keeps screenshots.
test-page: $(PAGE)
	.venv-page/bin/python -m pytest tests/page $(ARGS)

# References to models of timm, transformers and RobustBench, with these and a full torch (6 GB).
test-zoo: $(ZOO)
	OMP_NUM_THREADS=2 .venv-zoo/bin/python -m pytest tests/zoo $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(READY)
	$(BIN)/python tests/mutants.py

# What every recipe would take, by dry runs: a minute or two.
recipes: $(READY)
	$(BIN)/python -m tests.recipes $(ARGS)

# ARGS='--run RUN --standard --images 512' compares AutoAttack on a model of yours; AUTOATTACK_SRC names a checkout of its code.
# ARGS='--only architectures' compares networks with public code; ARCHITECTURES_SRC names a folder of checkouts, OWNER+NAME each.
agreement: $(PEERS)
	.venv-agreement/bin/python -m tests.agreement $(ARGS)

# ARGS='--rows pgd --repeats 3', '--quick', '--curves'; writes benchmarks/results/.
bench: $(RIVALS)
	.venv-bench/bin/python -m benchmarks $(ARGS)

# What a GPU is asked, in nine minutes.  ARGS='--pack FILE' makes a file of images where CIFAR-10 is, ARGS='--images FILE'
# reads it where the GPU is, and ARGS='--images FILE --device cpu --quick' tries everything out.
gpu-check: $(RIVALS)
	.venv-bench/bin/python -m benchmarks.gpu_check $(ARGS)

# docs/results.md, from results/*.json, which advebm reproduce TABLE --scale SCALE writes.
results: $(READY)
	$(BIN)/python -m advebm.reproduction.page

# The site, in build/site; ARGS='serve' shows it while it is written.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(ARGS),build)

clean:
	rm -rf .venv .venv-matrix .venv-agreement .venv-bench .venv-page .venv-zoo build dist .pytest_cache .mypy_cache .ruff_cache runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The peers, in an environment of their own; without what they require, which would replace torch.
$(PEERS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-agreement
	.venv-agreement/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data]' scipy requests tqdm
	.venv-agreement/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		pyautoattack==0.2.0 torchattacks==3.5.1 torch-fidelity==0.4.0 prdc==0.2
	touch $(PEERS)

# What is measured beside ours; without what it requires, which would replace torch.
$(RIVALS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data]' \
		scipy requests tqdm six eagerpy gitpython
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1 \
		foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1 torchebm==0.8.9 pyautoattack==0.2.0
	touch $(RIVALS)

$(PAGE): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-page
	.venv-page/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[app,data,dev]' 'selenium>=4'
	touch $(PAGE)

$(ZOO): pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 \
		timm==1.0.31 transformers==5.24.0 torchdiffeq geotorch gdown pandas scipy 'setuptools<80' -e '.[data]' 'pytest>=8'
	.venv-zoo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps robustbench==1.1.1 pyautoattack==0.2.0
	touch $(ZOO)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,dev]'
	touch $(READY)
