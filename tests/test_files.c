/* SPDX-License-Identifier: MIT
 * Files: whole writes and reads, directories, checksums, what is left behind, and what is refused. */
#include "src/files.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/crc32c.h"
#include "src/log.h"
#include "tests/check.h"

static char root[] = "/tmp/poe-test-files-XXXXXX";

static const char *in_root(const char *name)
{
    static char paths[4][POE_PATH_MAX];
    static int next;
    char *path = paths[next++ % 4];
    CHECK_INT(poe_path(path, "%s/%s", root, name), POE_OK);
    return path;
}

static bool exists(const char *path)
{
    struct stat info;
    return lstat(path, &info) == 0;
}

static void check_paths(void)
{
    char path[POE_PATH_MAX], name[POE_PATH_MAX + 8];
    memset(name, 'a', sizeof(name) - 1);
    name[sizeof(name) - 1] = '\0';
    CHECK_INT(poe_path(path, "%s", name), POE_BAD_INPUT);
    CHECK_INT(poe_path(path, "a/%d", 7), POE_OK);
    CHECK_STRING(path, "a/7");
}

/* No name ever appears in the folder, so no kill can leave one there. The notice that comes is of what is made after. */
static void check_writable(void)
{
    char event[sizeof(struct inotify_event) + NAME_MAX + 1];
    CHECK_INT(poe_make_directories(in_root("probed")), POE_OK);
    int fd = open(in_root("probed"), O_TMPFILE | O_WRONLY, 0600), watch = inotify_init1(IN_NONBLOCK);
    bool nameless = fd >= 0; /* not on every file system */
    close(fd);
    CHECK(watch >= 0 && inotify_add_watch(watch, in_root("probed"), IN_CREATE) >= 0);
    CHECK_INT(poe_check_writable(in_root("probed"), "--out"), POE_OK);
    CHECK_INT(mkdir(in_root("probed/after"), 0777), 0);
    CHECK(read(watch, event, sizeof(event)) > 0);
    if (nameless)
        CHECK_STRING(((struct inotify_event *)(void *)event)->name, "after");
    close(watch);
    CHECK_INT(rmdir(in_root("probed/after")), 0);
    CHECK_INT(rmdir(in_root("probed")), 0); /* nothing is left */
    CHECK_INT(poe_check_writable(in_root("nowhere"), "--out"), POE_BAD_INPUT);
}

static void check_directories(void)
{
    CHECK_INT(poe_make_directories(in_root("a/b/c/")), POE_OK);
    CHECK_INT(poe_make_directories(in_root("a/b/c")), POE_OK);
    CHECK_INT(poe_write_file(in_root("file"), "x", 1), POE_OK);
    CHECK_INT(poe_make_directories(in_root("file/d")), POE_BAD_INPUT);
    CHECK_INT(poe_make_directories(in_root("file")), POE_BAD_INPUT);
    CHECK_INT(symlink(in_root("file"), in_root("a/b/link")), 0);
    CHECK_INT(poe_remove_tree(in_root("a")), POE_OK);
    CHECK(!exists(in_root("a")));
    CHECK(exists(in_root("file"))); /* links are not followed */
    CHECK_INT(poe_remove_tree(in_root("a")), POE_OK);
}

static void check_whole_files(void)
{
    size_t n = 300000, size = 0;
    char *data = malloc(n), *back = NULL;
    for (size_t i = 0; i < n; i++)
        data[i] = (char)(i * i >> 3);
    CHECK_INT(poe_write_file(in_root("whole"), data, n), POE_OK);
    CHECK(!exists(in_root("whole.tmp")));
    CHECK_INT(poe_read_file(in_root("whole"), "--data", &back, &size), POE_OK);
    CHECK_INT(size, n);
    CHECK(back && memcmp(data, back, n) == 0 && back[n] == '\0');
    free(back);
    const char *map = NULL;
    CHECK_INT(poe_map_file(in_root("whole"), "--data", &map, &size), POE_OK);
    CHECK(map && size == n && memcmp(data, map, n) == 0);
    munmap((void *)map, size);
    uint64_t bytes = 0;
    uint32_t crc = 0;
    CHECK_INT(poe_checksum_file(in_root("whole"), &bytes, &crc), POE_OK);
    CHECK_INT(bytes, n);
    CHECK_INT(crc, poe_crc32c(0, data, n));
    CHECK_INT(poe_write_file(in_root("whole"), "", 0), POE_OK);
    CHECK_INT(poe_read_file(in_root("whole"), "--data", &back, &size), POE_OK);
    CHECK_INT(size, 0);
    CHECK_STRING(back, "");
    free(back);
    free(data);
}

static void check_refusals(void)
{
    char *data = NULL;
    size_t size = 0;
    uint64_t bytes;
    uint32_t crc;
    CHECK_INT(poe_read_file(in_root("absent"), "--data", &data, &size), POE_BAD_INPUT);
    CHECK_INT(poe_read_file(root, "--data", &data, &size), POE_BAD_INPUT);
    CHECK(data == NULL);
    const char *map = NULL;
    CHECK_INT(poe_map_file(in_root("absent"), "--data", &map, &size), POE_BAD_INPUT);
    CHECK_INT(poe_map_file(root, "--data", &map, &size), POE_BAD_INPUT);
    CHECK_INT(poe_write_file(in_root("empty"), "", 0), POE_OK);
    CHECK_INT(poe_map_file(in_root("empty"), "--data", &map, &size), POE_BAD_INPUT);
    CHECK_INT(mkfifo(in_root("fifo"), 0600), 0);
    CHECK_INT(poe_map_file(in_root("fifo"), "--data", &map, &size), POE_BAD_INPUT);
    CHECK_INT(poe_checksum_file(in_root("absent"), &bytes, &crc), POE_BAD_INPUT);
    CHECK_INT(poe_checksum_file(root, &bytes, &crc), POE_FAILED);
    CHECK_INT(poe_write_file(in_root("absent/file"), "x", 1), POE_FAILED);
    CHECK_INT(poe_make_directories(in_root("taken")), POE_OK);
    CHECK_INT(poe_write_file(in_root("taken"), "x", 1), POE_FAILED); /* a directory cannot be replaced */
    CHECK(!exists(in_root("taken.tmp")));
    CHECK_INT(poe_sync_path(in_root("absent")), POE_FAILED);
}

/* A full disk, where there is a device that plays one. */
static void check_full_disk(void)
{
    if (symlink("/dev/full", in_root("full.tmp")) != 0 || access("/dev/full", W_OK) != 0)
        return;
    CHECK_INT(poe_write_file(in_root("full"), "x", 1), POE_FAILED);
    CHECK(!exists(in_root("full")));
    CHECK(!exists(in_root("full.tmp")));
}

/* What a process has left that others share its names with. */
static void leave_temporary(void)
{
    CHECK_INT(poe_temporary_share(), POE_OK);
    pid_t child = fork();
    if (child == 0) {
        poe_temporary_register(in_root("orphan"));
        poe_write_file(in_root("orphan"), "0", 1);
        raise(SIGKILL);
    }
    CHECK_INT(waitpid(child, NULL, 0), child);
    CHECK(exists(in_root("orphan")));
}

static void check_temporaries(void)
{
    leave_temporary();
    CHECK_INT(poe_write_file(in_root("one"), "1", 1), POE_OK);
    CHECK_INT(poe_make_directories(in_root("two/deep")), POE_OK);
    CHECK_INT(poe_write_file(in_root("kept"), "3", 1), POE_OK);
    poe_temporary_register(in_root("one"));
    poe_temporary_register(in_root("two"));
    poe_temporary_register(in_root("kept"));
    poe_temporary_register(in_root("never made"));
    poe_temporary_forget(in_root("kept"));
    poe_temporary_forget(in_root("unknown"));
    poe_temporary_remove_all();
    CHECK(!exists(in_root("orphan")));
    CHECK(!exists(in_root("one")));
    CHECK(!exists(in_root("two")));
    CHECK(exists(in_root("kept")));
}

int main(void)
{
    if (!mkdtemp(root))
        return 1;
    check_paths();
    check_writable();
    check_directories();
    check_whole_files();
    poe_log *log = poe_log_create(0, 1); /* holds the sentences that the refusals say */
    poe_log_attach(log);
    poe_log_hold();
    check_refusals();
    check_full_disk();
    poe_log_settle(false);
    poe_log_destroy(log);
    check_temporaries();
    CHECK_INT(poe_remove_tree(root), POE_OK);
    return check_result();
}
