/* Which CPU a thread of a parallel region runs on. */
#define _GNU_SOURCE
#include "threads.h"

#include <omp.h>

enum { MAX_CPUS = 1024 };
static int cpus[MAX_CPUS], n_cpus;
__thread int smo_tiles_configured;

void smo_set_cpus(const int32_t *list, int n)
{
    n_cpus = n < MAX_CPUS ? n : MAX_CPUS;
    for (int i = 0; i < n_cpus; i++) cpus[i] = list[i];
}

static int bind_self(int i)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpus[i], &one);
    return sched_setaffinity(0, sizeof one, &one) == 0;
}

caller_t smo_bind_caller(int threads)
{
    caller_t caller = {.bound = 0};
    if (threads > 1 && threads <= n_cpus && sched_getaffinity(0, sizeof caller.mask, &caller.mask) == 0) caller.bound = bind_self(0);
    return caller;
}

void smo_release_caller(const caller_t *caller)
{
    if (caller->bound) sched_setaffinity(0, sizeof caller->mask, &caller->mask);
}

void smo_bind_worker(void)
{
    static __thread int bound = -1;
    smo_tiles_configured = 0;
    const int i = omp_get_thread_num();
    if (i > 0 && omp_get_num_threads() <= n_cpus && bound != i && bind_self(i)) bound = i;
}
