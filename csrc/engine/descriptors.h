/*
 * descriptors.h: which descriptors are the engines', so that a forked child of a rank does not keep them.
 *
 * A child of fork() (a DataLoader's worker) has copies of all sockets: the connections of a killed rank would stay open as long as
 * its child lives, and nobody would notice the death. So a fork handler closes the engines' descriptors in the child. Engines are
 * looked into by nobody there, their locks may be held by threads that the child does not have: hence this set of its own, with a
 * lock that is held for the length of one system call and under which no other is taken. A fork waits for it.
 */
#ifndef DSS_DESCRIPTORS_H
#define DSS_DESCRIPTORS_H

/* Around a call that opens a descriptor: no fork comes between it and the set. */
void dss_descriptor_begin(void);
/* What the call returned, errno as well: -1 stays -1. Without memory for the set the descriptor is closed, -1 and ENOMEM. */
int dss_descriptor_end(int fd);
/* Any descriptor, also one that is not in the set. */
void dss_descriptor_close(int fd);
/* How many forks lie between the program's start and this process: what was made in another generation is not of this process. */
unsigned dss_descriptor_generation(void);

#endif
