/* Makes the system clock of the processes that load it jump.
 *
 * Build: cc -shared -fPIC -o faults_clock.so faults_clock.c
 * Use: LD_PRELOAD=faults_clock.so CLOCK_OFFSET=FILE PROGRAM
 *
 * The file holds one 64-bit integer, the seconds that are added to the system clock. It is mapped
 * into memory, so that a change takes effect at once in all processes. The monotonic clock, the
 * times of files and the kernel's own clock do not change. libfaketime can do this too, but version
 * 0.9.10, which Debian and Ubuntu have, breaks time.sleep() of Python 3.11 if the monotonic clock is
 * left alone.
 *
 * A wait that has begun is not changed by a jump. A later wait until a time of the system clock is
 * translated into the kernel's time.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *file;

__attribute__((constructor)) static void open_file(void)
{
    const char *name = getenv("CLOCK_OFFSET");
    int number = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    void *mapped = number < 0 ? MAP_FAILED
                              : mmap(NULL, sizeof *file, PROT_READ, MAP_SHARED, number, 0);
    if (number >= 0)
        close(number);
    if (mapped != MAP_FAILED)
        file = mapped;
}

static int64_t offset(void)
{
    return file ? *file : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*next)(clockid_t, struct timespec *);
    if (!next)
        next = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = next(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    *now = (struct timeval){precise.tv_sec, precise.tv_nsec / 1000};
    return failed;
}

time_t time(time_t *result)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (result)
        *result = precise.tv_sec;
    return precise.tv_sec;
}

/* The libraries of Ray wait until a time of the system clock by this system call. */
long syscall(long number, ...)
{
    static long (*next)(long, ...);
    if (!next)
        next = dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
        struct timespec until = *(const struct timespec *)a[3];
        until.tv_sec -= offset();
        return next(number, a[0], a[1], a[2], &until, a[4], a[5]);
    }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
