/*
 * Runs a target without libFuzzer: frame_fuzz [seed [inputs]]. A failure names the seed and the input.
 * frame_fuzz seeds FOLDER writes the seeds there, for libFuzzer to begin from.
 */
#include "driver.h"

static uint64_t first_seed = 1;
static unsigned long input_number;
static unsigned long input_count;

static void tell_where(void) {
    if (input_number < input_count)
        fprintf(stderr, "at input %lu of seed %" PRIu64 "\n", input_number, first_seed);
}

static unsigned count_seeds(void) {
    uint8_t bytes[FUZZ_INPUT_BYTES];
    unsigned count = 0;
    while (fuzz_seed(count, bytes))
        count++;
    return count;
}

static void write_seeds(const char *folder) {
    uint8_t bytes[FUZZ_INPUT_BYTES];
    char path[4096];
    size_t count = 0;
    for (unsigned number = 0; (count = fuzz_seed(number, bytes)); number++) {
        snprintf(path, sizeof path, "%s/seed-%u", folder, number);
        FILE *file = fopen(path, "wb");
        CHECK_FOR(file && fwrite(bytes, 1, count, file) == count && fclose(file) == 0, "%s", path);
    }
}

/* One small change; most of what is found lies a few of these from a good input. Returns the new size, never 0. */
static size_t mutate(uint64_t *chance, uint8_t *bytes, size_t count) {
    const uint32_t at = check_random_below(chance, (uint32_t)count);
    switch (check_random_below(chance, 6)) {
    case 0:
        bytes[at] ^= (uint8_t)(1u << check_random_below(chance, 8));
        return count;
    case 1:
        bytes[at] = (uint8_t)check_random(chance);
        return count;
    case 2:
        bytes[at] = (uint8_t)(check_random_below(chance, 2) ? 0 : 0xff);
        return count;
    case 3: /* cut or lengthen */
        if (check_random_below(chance, 2))
            return at + 1;
        for (; count < FUZZ_INPUT_BYTES && check_random_below(chance, 8); count++)
            bytes[count] = (uint8_t)check_random(chance);
        return count;
    case 4: { /* one part over another */
        const uint32_t from = check_random_below(chance, (uint32_t)count);
        const size_t most = count - (at > from ? at : from);
        memmove(bytes + at, bytes + from, 1 + check_random_below(chance, (uint32_t)most));
        return count;
    }
    default: /* small numbers make most of what a script means */
        bytes[at] = (uint8_t)check_random_below(chance, 8);
        return count;
    }
}

static size_t make_input(uint64_t *chance, unsigned seed_count, uint8_t *bytes) {
    size_t count = 1 + check_random_below(chance, FUZZ_INPUT_BYTES);
    if (check_random_below(chance, 8)) {
        count = fuzz_seed(check_random_below(chance, seed_count), bytes);
        for (uint32_t changes = check_random_below(chance, 8); changes; changes--)
            count = mutate(chance, bytes, count);
    } else {
        for (size_t i = 0; i < count; i++)
            bytes[i] = (uint8_t)check_random(chance);
    }
    return count;
}

int main(int argument_count, char **arguments) {
    if (argument_count == 3 && strcmp(arguments[1], "seeds") == 0) {
        write_seeds(arguments[2]);
        return 0;
    }
    input_count = fuzz_input_count;
    if (argument_count > 1)
        first_seed = strtoull(arguments[1], NULL, 0);
    if (argument_count > 2)
        input_count = strtoul(arguments[2], NULL, 0);
    uint64_t chance = first_seed ? first_seed : 1; /* 0 would stay 0 */
    const unsigned seed_count = count_seeds();
    check_begin("the fuzz driver");
    atexit(tell_where);
    for (input_number = 0; input_number < input_count; input_number++) {
        uint8_t bytes[FUZZ_INPUT_BYTES];
        const size_t count = make_input(&chance, seed_count, bytes);
        uint8_t *exact = malloc(count); /* so that the address sanitizer sees every byte read too far */
        memcpy(exact, bytes, count);
        CHECK_EQUAL(LLVMFuzzerTestOneInput(exact, count), 0);
        free(exact);
    }
    CHECK_FOR(fuzz_through_count > input_count / 100, "%lu inputs of %lu that got through", fuzz_through_count, input_count);
    check_passed(arguments[0], "the_invariants_hold");
}
