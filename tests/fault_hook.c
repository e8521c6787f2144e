/* Preloaded into a command: counts the calls that change files below a folder, and disturbs one.

   Nothing happens before fault_arm. faults.py compiles this and describes the actions. A call is
   counted by its wrapper here, so what libc does within another call (fprintf) is not seen; fwrite
   is, which np.ndarray.tofile uses, and it is passed on unbuffered. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum verdict { PASS, FAIL, HALF };
enum needs { NOTHING, SPACE, ENTRY }; /* blocks of the disk now; perhaps an entry in a directory */

static struct {
    char root[4096];
    int log, call, action, number;
    volatile int count, full;
} hook;

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

/* `call` 0 only writes the list of calls to the file `log`. Actions: see fault(). */
void fault_arm(const char *root, const char *log, int call, int action, int number) {
    hook.log = REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    hook.call = call, hook.action = action, hook.number = number;
    snprintf(hook.root, sizeof hook.root, "%s", root);
}

/* The path of a call, absolute, or 0 if it is not below the root. `path` NULL: that of `fd`. */
static int below_root(int fd, const char *path, char *out, size_t size) {
    char link[64];
    size_t n = 0, root = strlen(hook.root);
    if (!path || (path[0] != '/' && fd != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, out, size - 1);
        n = length < 0 ? 0 : length;
    } else if (path[0] != '/' && getcwd(out, size)) {
        n = strlen(out);
    }
    snprintf(out + n, size - n, "%s%s", n && path ? "/" : "", path ? path : "");
    return !strncmp(out, hook.root, root) && (out[root] == '/' || !out[root]);
}

static enum verdict fault(const char *name, enum needs needs, int fd, const char *path, size_t n) {
    char absolute[8192], line[8400];
    int saved = errno;
    if (!hook.root[0] || !below_root(fd, path, absolute, sizeof absolute)) {
        errno = saved;
        return PASS;
    }
    int call = __atomic_add_fetch(&hook.count, 1, __ATOMIC_SEQ_CST);
    int fires = call == hook.call && !(hook.number == ENOSPC && needs == NOTHING)
        && !(hook.action == 't' && !n);
    int length = snprintf(line, sizeof line, "%s%s %zu %s\n", fires ? "*" : "", name, n,
                          absolute + strlen(hook.root));
    REAL(write)(hook.log, line, length);
    errno = saved;
    if (hook.full && needs == SPACE) {
        errno = hook.number;
        return FAIL;
    }
    if (!fires)
        return PASS;
    switch (hook.action) {
    case 'k': /* kill before the call */
        kill(getpid(), SIGKILL);
        pause();
    case 't': /* kill after half of a write */
        return HALF;
    case 'f': /* half of a write, and from then on the disk is full */
        hook.full = 1;
        if (n > 1)
            return HALF; /* else as 'e' */
    case 'e': /* this call fails */
        errno = hook.number;
        return FAIL;
    case 's': /* signal; a thread's call is slow: the main thread gets ahead, then has time to react */
        if (syscall(SYS_gettid) != getpid())
            usleep(500000);
        kill(getpid(), hook.number);
        if (syscall(SYS_gettid) != getpid())
            usleep(200000);
        return PASS;
    case 'd': /* delay in ms */
        usleep(hook.number * 1000);
    }
    return PASS;
}

static void after_half(void) {
    if (hook.action == 't') {
        kill(getpid(), SIGKILL);
        pause();
    }
}

/* A wrapper of a call that returns -1 on failure, under the names `name` and name##64. */
#define WRAP(type, name, parameters, arguments, needs, fd, path, n)                                \
    type name parameters {                                                                         \
        return fault(#name, needs, fd, path, n) == FAIL ? -1 : REAL(name) arguments;               \
    }

#define WRAP_WRITE(name, parameters, half_arguments, arguments)                                    \
    ssize_t name parameters {                                                                      \
        enum verdict verdict = fault(#name, SPACE, fd, NULL, n);                                   \
        if (verdict == FAIL)                                                                       \
            return -1;                                                                             \
        if (verdict == PASS)                                                                       \
            return REAL(name) arguments;                                                           \
        ssize_t written = REAL(name) half_arguments;                                               \
        after_half();                                                                              \
        return written;                                                                            \
    }

#define WRITE_PARAMETERS (int fd, const void *buffer, size_t n)
#define PWRITE_PARAMETERS (int fd, const void *buffer, size_t n, off_t at)
WRAP_WRITE(write, WRITE_PARAMETERS, (fd, buffer, n / 2), (fd, buffer, n))
WRAP_WRITE(pwrite, PWRITE_PARAMETERS, (fd, buffer, n / 2, at), (fd, buffer, n, at))
WRAP_WRITE(pwrite64, PWRITE_PARAMETERS, (fd, buffer, n / 2, at), (fd, buffer, n, at))
WRAP_WRITE(sendfile, (int fd, int in, off_t *at, size_t n), (fd, in, at, n / 2), (fd, in, at, n))
WRAP_WRITE(sendfile64, (int fd, int in, off_t *at, size_t n), (fd, in, at, n / 2), (fd, in, at, n))
WRAP_WRITE(copy_file_range,
           (int in, off_t *in_at, int fd, off_t *at, size_t n, unsigned flags),
           (in, in_at, fd, at, n / 2, flags), (in, in_at, fd, at, n, flags))


/* Half of a vectored write is its first vector. */
WRAP_WRITE(writev, (int fd, const struct iovec *v, int n), (fd, v, 1), (fd, v, n))

size_t fwrite(const void *buffer, size_t size, size_t n, FILE *file) {
    enum verdict verdict = hook.root[0] && fileno(file) >= 0
        ? fault("fwrite", SPACE, fileno(file), NULL, size * n) : PASS;
    if (verdict == FAIL)
        return 0;
    size_t items = REAL(fwrite)(buffer, size, verdict == HALF ? n / 2 : n, file);
    if (hook.root[0])
        fflush(file);
    if (verdict == HALF) {
        after_half();
        errno = hook.number;
    }
    return items;
}

#define WRAP_OPEN(name, parameters, arguments, fd, writes)                                         \
    int name parameters {                                                                          \
        va_list list;                                                                              \
        va_start(list, flags);                                                                     \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, int) : 0;                          \
        va_end(list);                                                                              \
        if ((flags & O_ACCMODE) != O_RDONLY                                                        \
            && fault("open", flags & (O_CREAT | O_TMPFILE) ? SPACE : NOTHING, fd, path, 0) == FAIL) \
            return -1;                                                                             \
        return REAL(name) arguments;                                                               \
    }

WRAP_OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD, )
WRAP_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD, )
WRAP_OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at, )
WRAP_OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at, )

#define FROM_TO (const char *from, const char *to)
#define FROM_TO_AT (int a, const char *from, int b, const char *to)
WRAP(int, creat, (const char *path, mode_t mode), (path, mode), SPACE, AT_FDCWD, path, 0)
WRAP(int, creat64, (const char *path, mode_t mode), (path, mode), SPACE, AT_FDCWD, path, 0)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), SPACE, AT_FDCWD, path, 0)
WRAP(int, mkdirat, (int a, const char *path, mode_t mode), (a, path, mode), SPACE, a, path, 0)
WRAP(int, rename, FROM_TO, (from, to), ENTRY, AT_FDCWD, to, 0)
WRAP(int, renameat, FROM_TO_AT, (a, from, b, to), ENTRY, b, to, 0)
WRAP(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags),
     (a, from, b, to, flags), ENTRY, b, to, 0)
WRAP(int, link, FROM_TO, (from, to), SPACE, AT_FDCWD, to, 0)
WRAP(int, linkat, (int a, const char *from, int b, const char *to, int flags),
     (a, from, b, to, flags), SPACE, b, to, 0)
WRAP(int, symlink, FROM_TO, (from, to), SPACE, AT_FDCWD, to, 0)
WRAP(int, unlink, (const char *path), (path), NOTHING, AT_FDCWD, path, 0)
WRAP(int, unlinkat, (int a, const char *path, int flags), (a, path, flags), NOTHING, a, path, 0)
WRAP(int, rmdir, (const char *path), (path), NOTHING, AT_FDCWD, path, 0)
WRAP(int, remove, (const char *path), (path), NOTHING, AT_FDCWD, path, 0)
WRAP(int, fsync, (int fd), (fd), ENTRY, fd, NULL, 0)
WRAP(int, fdatasync, (int fd), (fd), ENTRY, fd, NULL, 0)
WRAP(int, ftruncate, (int fd, off_t n), (fd, n), NOTHING, fd, NULL, 0)
WRAP(int, ftruncate64, (int fd, off_t n), (fd, n), NOTHING, fd, NULL, 0)
WRAP(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), SPACE, fd, NULL, 0)
WRAP(int, fallocate64, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), SPACE, fd, NULL, 0)
