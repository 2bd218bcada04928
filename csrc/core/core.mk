# The core, the engine and their tests, without Python: included by the top-level Makefile, or alone from the repository root:
#   make -f csrc/core/core.mk core-test
# Nothing is built in the source tree. Each flavour (plain, sanitized) has a folder of its own under build/core.

CORE_BUILD ?= build/core
CORE_CFLAGS ?= -O3
CORE_WARNINGS ?= -Wall -Wextra -Wpedantic -Werror
CORE_FLAGS = -std=c11 $(CORE_WARNINGS) -fvisibility=hidden -Icsrc/include -Icsrc/core -Icsrc/engine $(CORE_CFLAGS)
CORE_SOURCES := $(sort $(wildcard csrc/core/*.c csrc/engine/*.c))
CORE_TESTS := $(sort $(wildcard tests/c/*_test.c))
CORE_HEADERS := $(wildcard csrc/include/*.h csrc/core/*.h csrc/engine/*.h tests/c/*.h tests/fuzz/*.h)
CORE_FUZZERS := $(sort $(wildcard tests/fuzz/*_fuzz.c))
CORE_LIBRARY = $(CORE_BUILD)/libdssync_core.a
CORE_OBJECTS = $(patsubst csrc/%.c,$(CORE_BUILD)/%.o,$(CORE_SOURCES))
CORE_PROGRAMS = $(CORE_TESTS:tests/c/%.c=$(CORE_BUILD)/%)
CORE_FUZZ_PROGRAMS = $(CORE_FUZZERS:tests/fuzz/%.c=$(CORE_BUILD)/%)
CORE_SANITIZE_ADDRESS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

# Tests run one after another, but what they need is built by all processors, unless make -j has said how many.
CORE_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
CORE_PARALLEL = --no-print-directory --output-sync $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(CORE_JOBS))

CLANG ?= clang
CLANG_TIDY ?= clang-tidy
FUZZ_SECONDS ?= 60
SOAK_OPERATIONS ?= 100000
SOAK_SEED ?= $(shell date +%s)

.PHONY: core core-programs core-test core-fuzz core-tidy core-clean sanitize sanitize-address sanitize-thread fuzz fuzz-long soak

core: $(CORE_LIBRARY)

$(CORE_OBJECTS): $(CORE_BUILD)/%.o: csrc/%.c $(CORE_HEADERS) | $(CORE_BUILD)/made
	$(CC) $(CORE_FLAGS) -c $< -o $@

$(CORE_LIBRARY): $(CORE_OBJECTS)
	rm -f $@
	$(AR) rcs $@ $^

$(CORE_PROGRAMS): $(CORE_BUILD)/%: tests/c/%.c $(CORE_LIBRARY) $(CORE_HEADERS)
	$(CC) $(CORE_FLAGS) -Itests/c $< $(CORE_LIBRARY) -o $@ $(CORE_LINK) -lm -pthread

$(CORE_FUZZ_PROGRAMS): $(CORE_BUILD)/%: tests/fuzz/%.c tests/fuzz/driver.c $(CORE_LIBRARY) $(CORE_HEADERS)
	$(CC) $(CORE_FLAGS) -Itests/c $< tests/fuzz/driver.c $(CORE_LIBRARY) -o $@ -lm -pthread

$(CORE_BUILD)/memory_test: CORE_LINK = -Wl,--wrap=malloc,--wrap=calloc
$(CORE_BUILD)/fallback_test: CORE_LINK = -Wl,--wrap=memfd_create,--wrap=connect,--wrap=malloc,--wrap=calloc,--wrap=realloc
$(CORE_BUILD)/killed_test: CORE_LINK = -Wl,--wrap=connect,--wrap=accept4,--wrap=sendmsg,--wrap=recvmsg

$(CORE_BUILD)/made:
	mkdir -p $(CORE_BUILD)/core $(CORE_BUILD)/engine
	touch $@

core-programs: $(CORE_PROGRAMS) $(CORE_FUZZ_PROGRAMS)

# Every program runs even when one fails. A program prints `ok test` for each test passed and stops at the first that fails.
core-test:
	@$(MAKE) $(CORE_PARALLEL) -f csrc/core/core.mk core-programs
	@passed=0; failed=0; \
	for program in $(CORE_PROGRAMS) $(CORE_FUZZ_PROGRAMS); do \
	    $$program >$$program.log 2>&1 || { failed=$$((failed + 1)); echo "FAILED $$program" >>$$program.log; }; \
	    cat $$program.log; passed=$$((passed + $$(grep -c '^ok ' $$program.log || true))); \
	done; \
	echo "$$passed passed, $$failed failed"; test $$failed -eq 0

sanitize: sanitize-address sanitize-thread

sanitize-address:
	$(MAKE) -f csrc/core/core.mk core-test CORE_BUILD=build/core-address \
	    CORE_CFLAGS="$(CORE_SANITIZE_ADDRESS)"

# Fuzz targets have one thread.
sanitize-thread:
	$(MAKE) -f csrc/core/core.mk core-test CORE_BUILD=build/core-thread CORE_FUZZERS= CORE_CFLAGS="-O2 -g -fsanitize=thread"

# The fuzz targets alone, driven blindly for a fixed number of inputs: any compiler, seconds. core-test and sanitize run them too.
fuzz:
	$(MAKE) -f csrc/core/core.mk core-fuzz CORE_BUILD=build/core-address CORE_CFLAGS="$(CORE_SANITIZE_ADDRESS)"

core-fuzz: $(CORE_FUZZ_PROGRAMS)
	@for program in $^; do $$program || exit 1; done

# The same by hand, driven by coverage: clang with its libFuzzer. What is found and what was learnt stays in build/fuzz.
fuzz-long: $(CORE_FUZZ_PROGRAMS)
	@for target in $(CORE_FUZZERS:tests/fuzz/%.c=%); do \
	    mkdir -p build/fuzz/$$target.corpus && $(CORE_BUILD)/$$target seeds build/fuzz/$$target.corpus && \
	    $(CLANG) $(CORE_FLAGS) -Itests/c -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all tests/fuzz/$$target.c \
	        $(CORE_SOURCES) -o build/fuzz/$$target -lm -pthread && \
	    build/fuzz/$$target -max_total_time=$(FUZZ_SECONDS) -max_len=512 -print_final_stats=1 \
	        -artifact_prefix=build/fuzz/$$target- build/fuzz/$$target.corpus || exit 1; \
	done

# core-test's soak for longer, another run each time; what fails is repeated with SOAK_SEED.
soak: $(CORE_BUILD)/soak_test
	$< $(SOAK_SEED) $(SOAK_OPERATIONS)

# Not part of any test: clang-tidy need not be installed.
core-tidy:
	$(CLANG_TIDY) --quiet $(CORE_SOURCES) $(CORE_TESTS) -- -std=c11 -Icsrc/include -Icsrc/core -Icsrc/engine -Itests/c

core-clean:
	rm -rf build/core build/core-address build/core-thread build/fuzz
