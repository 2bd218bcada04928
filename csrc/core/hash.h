/*
 * hash.h: 64-bit FNV-1a, one byte at a time.
 *
 * It tells slips apart (a plan or a layout that differs between ranks) and is trivially the same on every machine. Each step is a
 * bijection of the state, so any single changed byte changes the result for certain. It is no defence against someone who wants a
 * collision. About 1 GB/s, which is nothing next to making what it hashes.
 */
#ifndef DSS_HASH_H
#define DSS_HASH_H

#include "dssync.h"

#define DSS_HASH_BEGIN 14695981039346656037u /* FNV's offset basis */

/* dss_hash() without its special case for 0: feed the pieces of one message in turn, beginning with DSS_HASH_BEGIN. */
uint64_t dss_hash_more(uint64_t state, const void *bytes, size_t bytes_bytes);

#endif
