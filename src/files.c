/* SPDX-License-Identifier: MIT */
#include "src/files.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/crc32c.h"
#include "src/log.h"

/* More than all threads of one process have at a time. Takes memory only where it is written. */
enum { TEMPORARIES = 256 };

typedef struct temporary {
    atomic_bool used; /* `path` is whole */
    char path[POE_PATH_MAX];
} temporary;

static pthread_mutex_t temporaries_lock = PTHREAD_MUTEX_INITIALIZER;
static temporary own_temporaries[TEMPORARIES], *temporaries = own_temporaries;

poe_status poe_path(char path[POE_PATH_MAX], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int length = vsnprintf(path, POE_PATH_MAX, format, args);
    va_end(args);
    if (length < 0 || length >= POE_PATH_MAX) {
        poe_error("the path %.60s... has more than %d bytes", path, POE_PATH_MAX - 1);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

/* mkdir that is content with a directory that is there. */
static poe_status make_directory(const char *path, const char *whole)
{
    struct stat info;
    if (mkdir(path, 0777) == 0)
        return POE_OK;
    int reason = errno;
    if (stat(path, &info) == 0) {
        if (S_ISDIR(info.st_mode))
            return POE_OK;
        reason = ENOTDIR;
    }
    poe_error("cannot make the directory %s: %s: %s", whole, path, strerror(reason));
    return POE_BAD_INPUT;
}

poe_status poe_make_directories(const char *path)
{
    char part[POE_PATH_MAX];
    poe_status status = poe_path(part, "%s", path);
    for (char *slash = part; status == POE_OK && *slash; slash++) {
        if (*slash != '/' || slash == part)
            continue;
        *slash = '\0';
        status = make_directory(part, path);
        *slash = '/';
    }
    return status == POE_OK ? make_directory(part, path) : status;
}

/* A file that is gone when it is closed; -1 with errno. It has a name only where the file system cannot do without: a
 * kill in between leaves that behind. */
static int open_nameless(const char *folder)
{
    char name[POE_PATH_MAX];
    int fd = open(folder, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR))
        return fd;
    if (snprintf(name, sizeof(name), "%s/.poe-XXXXXX", folder) >= (int)sizeof(name)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    fd = mkostemp(name, O_CLOEXEC);
    if (fd >= 0)
        unlink(name);
    return fd;
}

poe_status poe_check_writable(const char *path, const char *what)
{
    int fd = open_nameless(path);
    if (fd < 0) {
        poe_error("%s: cannot make files in %s: %s", what, path, strerror(errno));
        return POE_BAD_INPUT;
    }
    close(fd);
    return POE_OK;
}

/* Up to `bytes` bytes, fewer only at the end of the file; -1 with errno. */
static ssize_t read_full(int fd, char *data, size_t bytes)
{
    size_t done = 0;
    while (done < bytes) {
        ssize_t n = read(fd, data + done, bytes - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        if (n == 0)
            break;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

/* All that `fd` gives: it may be a pipe, so its length is only a first guess. NULL with errno. */
static char *read_all(int fd, size_t guess, size_t *size)
{
    size_t room = guess + 1, used = 0;
    char *data = malloc(room + 1);
    while (data) {
        ssize_t n = read_full(fd, data + used, room - used);
        if (n < 0)
            break;
        used += (size_t)n;
        if (used < room) {
            data[used] = '\0';
            *size = used;
            return data;
        }
        room *= 2;
        char *larger = realloc(data, room + 1);
        if (!larger)
            break;
        data = larger;
    }
    int reason = errno;
    free(data);
    errno = reason;
    return NULL;
}

poe_status poe_read_file(const char *path, const char *what, char **data, size_t *size)
{
    struct stat info = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *all = NULL;
    if (fd >= 0 && fstat(fd, &info) == 0)
        all = read_all(fd, (size_t)info.st_size, size);
    poe_status status = POE_OK;
    if (!all) {
        status = errno == ENOMEM ? POE_FAILED : POE_BAD_INPUT;
        poe_error("%s: cannot read %s: %s", what, path, strerror(errno));
    }
    if (fd >= 0)
        close(fd);
    if (all)
        *data = all;
    return status;
}

/* Maps the open file; what keeps it from being mapped, or NULL. */
static const char *map_open_file(int fd, const char **data, size_t *size)
{
    struct stat info;
    if (fstat(fd, &info) != 0)
        return strerror(errno);
    if (!S_ISREG(info.st_mode))
        return "it is not a regular file";
    if (info.st_size == 0)
        return "it is empty";
    void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED)
        return strerror(errno);
    *data = map;
    *size = (size_t)info.st_size;
    return NULL;
}

poe_status poe_map_file(const char *path, const char *what, const char **data, size_t *size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe without a writer is refused, not waited for */
    const char *reason = fd < 0 ? strerror(errno) : map_open_file(fd, data, size);
    if (reason)
        poe_error("%s: cannot read %s: %s", what, path, reason);
    if (fd >= 0)
        close(fd);
    return reason ? POE_BAD_INPUT : POE_OK;
}

static bool write_full(int fd, const char *data, size_t bytes)
{
    while (bytes) {
        ssize_t n = write(fd, data, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        data += n;
        bytes -= (size_t)n;
    }
    return true;
}

poe_status poe_write_file(const char *path, const void *data, size_t size)
{
    char name[POE_PATH_MAX];
    poe_status status = poe_path(name, "%s.tmp", path);
    if (status != POE_OK)
        return status;
    poe_temporary_register(name);
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    bool written = fd >= 0 && write_full(fd, data, size);
    int reason = errno;
    if (fd >= 0 && close(fd) != 0 && written) {
        written = false;
        reason = errno;
    }
    if (written)
        return poe_replace_file(name, path);
    poe_error("cannot write %s: %s", name, strerror(reason));
    unlink(name);
    poe_temporary_forget(name);
    return POE_FAILED;
}

/* A directory's entry is on the disk only when the directory is. */
static poe_status sync_parent(const char *path)
{
    const char *slash = strrchr(path, '/');
    char parent[POE_PATH_MAX] = ".";
    if (slash)
        snprintf(parent, sizeof(parent), "%.*s", slash == path ? 1 : (int)(slash - path), path);
    return poe_sync_path(parent);
}

poe_status poe_replace_file(const char *name, const char *path)
{
    poe_status status = poe_sync_path(name);
    if (status == POE_OK && poe_temporary_rename(name, path, 0) != 0) {
        poe_error("cannot rename %s to %s: %s", name, path, strerror(errno));
        status = POE_FAILED;
    }
    if (status != POE_OK)
        unlink(name);
    poe_temporary_forget(name);
    return status == POE_OK ? sync_parent(path) : status;
}

poe_status poe_checksum_file(const char *path, uint64_t *size, uint32_t *crc)
{
    enum { CHUNK = 1 << 16 };
    char chunk[CHUNK];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        poe_error("cannot read %s: %s", path, strerror(errno));
        return POE_BAD_INPUT;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); /* synced pages leave the cache, so that the disk is what we read */
    uint64_t total = 0;
    uint32_t sum = 0;
    ssize_t n;
    while ((n = read_full(fd, chunk, CHUNK)) > 0) {
        sum = poe_crc32c(sum, chunk, (size_t)n);
        total += (uint64_t)n;
    }
    if (n < 0)
        poe_error("cannot read %s: %s", path, strerror(errno));
    close(fd);
    if (n < 0)
        return POE_FAILED;
    *size = total;
    *crc = sum;
    return POE_OK;
}

poe_status poe_sync_path(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    /* EINVAL: a file system that cannot sync this kind of file has nothing to lose. */
    bool synced = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);
    if (!synced)
        poe_error("cannot sync %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return synced ? POE_OK : POE_FAILED;
}

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *place)
{
    (void)info, (void)type, (void)place;
    return remove(path) == 0 || errno == ENOENT ? 0 : -1;
}

static bool remove_quietly(const char *path)
{
    return nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS) == 0 || errno == ENOENT;
}

poe_status poe_remove_tree(const char *path)
{
    if (remove_quietly(path))
        return POE_OK;
    poe_error("cannot remove %s: %s", path, strerror(errno));
    return POE_FAILED;
}

poe_status poe_temporary_share(void)
{
    void *shared =
        mmap(NULL, sizeof(own_temporaries), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (shared == MAP_FAILED) {
        poe_error("the memory for names of temporary files cannot be mapped: %s", strerror(errno));
        return POE_FAILED;
    }
    temporaries = shared;
    return POE_OK;
}

/* Without a free place, or with a path too long, it is only not removed by a signal. */
void poe_temporary_register(const char *path)
{
    int i = 0;
    pthread_mutex_lock(&temporaries_lock);
    while (i < TEMPORARIES && atomic_load(&temporaries[i].used))
        i++;
    if (i < TEMPORARIES && strlen(path) < POE_PATH_MAX) {
        strcpy(temporaries[i].path, path);
        atomic_store(&temporaries[i].used, true);
    }
    pthread_mutex_unlock(&temporaries_lock);
}

void poe_temporary_forget(const char *path)
{
    pthread_mutex_lock(&temporaries_lock);
    for (int i = 0; i < TEMPORARIES; i++)
        if (atomic_load(&temporaries[i].used) && strcmp(temporaries[i].path, path) == 0)
            atomic_store(&temporaries[i].used, false);
    pthread_mutex_unlock(&temporaries_lock);
}

int poe_temporary_rename(const char *path, const char *final, unsigned flags)
{
    pthread_mutex_lock(&temporaries_lock);
    int failed = renameat2(AT_FDCWD, path, AT_FDCWD, final, flags), reason = errno;
    pthread_mutex_unlock(&temporaries_lock);
    errno = reason;
    return failed;
}

/* Into a directory other processes may be writing, which are about to end too. */
void poe_temporary_remove_all(void)
{
    enum { TRIES = 50 };
    const struct timespec moment = {.tv_nsec = 4000000};
    pthread_mutex_lock(&temporaries_lock);
    for (temporary *t = temporaries; t < temporaries + TEMPORARIES; t++) {
        for (int i = 0; atomic_load(&t->used) && i < TRIES && !remove_quietly(t->path); i++)
            nanosleep(&moment, NULL);
        atomic_store(&t->used, false);
    }
}
