/* Thread i of a region runs on CPU i of a list. Left to itself the scheduler can wake two of them on one CPU, where they stay
 * for seconds: every kernel then takes twice as long. The caller is bound for the call only, since its mask is inherited by
 * whatever it starts. Define _GNU_SOURCE first. */
#ifndef SPECMOEOFF_THREADS_H
#define SPECMOEOFF_THREADS_H

#include <sched.h>
#include <stdint.h>

typedef struct {
    cpu_set_t mask;
    int bound;
} caller_t;

void smo_set_cpus(const int32_t *list, int n);
caller_t smo_bind_caller(int threads);
void smo_release_caller(const caller_t *caller);
void smo_bind_worker(void);
/* Whether this thread's AMX tiles are as amx.h wants them; no longer in the next region. */
extern __thread int smo_tiles_configured;

/* All threads run the rest, which may hold work-sharing constructs. */
#define EACH_THREAD(threads, ...)                           \
    do {                                                    \
        const int threads_ = (threads);                     \
        const caller_t caller_ = smo_bind_caller(threads_); \
        _Pragma("omp parallel num_threads(threads_)")       \
        {                                                   \
            smo_bind_worker();                              \
            __VA_ARGS__;                                    \
        }                                                   \
        smo_release_caller(&caller_);                       \
    } while (0)

#endif
