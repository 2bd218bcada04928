#include "descriptors.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORD_BITS 64u

static pthread_once_t registered = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t *set; /* a bit for each descriptor; grows, is never freed */
static size_t set_words;
static atomic_uint generation;

static void before_fork(void) {
    (void)pthread_mutex_lock(&lock);
}

static void after_fork(void) {
    (void)pthread_mutex_unlock(&lock);
}

/* close() only: the connections are the parent's, and go on. */
static void in_child(void) {
    for (size_t word = 0; word < set_words; word++) {
        for (unsigned bit = 0; set[word]; bit++, set[word] >>= 1)
            if (set[word] & 1)
                (void)close((int)(word * WORD_BITS + bit));
    }
    atomic_fetch_add_explicit(&generation, 1, memory_order_relaxed);
    after_fork();
}

static void register_handlers(void) {
    (void)pthread_atfork(before_fork, after_fork, in_child);
}

void dss_descriptor_begin(void) {
    (void)pthread_once(&registered, register_handlers);
    (void)pthread_mutex_lock(&lock);
}

int dss_descriptor_end(int fd) {
    const int error = errno;
    const size_t words = fd < 0 ? 0 : (size_t)fd / WORD_BITS + 1;
    if (words > set_words) {
        uint64_t *larger = realloc(set, words * sizeof *set);
        if (larger) {
            memset(larger + set_words, 0, (words - set_words) * sizeof *set);
            set = larger;
            set_words = words;
        }
    }
    const int added = words <= set_words ? fd : -1;
    if (added >= 0)
        set[words - 1] |= (uint64_t)1 << ((size_t)fd % WORD_BITS);
    else if (fd >= 0)
        (void)close(fd);
    (void)pthread_mutex_unlock(&lock);
    errno = added == fd ? error : ENOMEM;
    return added;
}

void dss_descriptor_close(int fd) {
    dss_descriptor_begin();
    const size_t word = (size_t)fd / WORD_BITS;
    if (word < set_words)
        set[word] &= ~((uint64_t)1 << ((size_t)fd % WORD_BITS));
    (void)close(fd);
    (void)pthread_mutex_unlock(&lock);
}

unsigned dss_descriptor_generation(void) {
    return atomic_load_explicit(&generation, memory_order_relaxed);
}
