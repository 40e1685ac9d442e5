/* SPDX-License-Identifier: MIT
 * Files that survive: written under a temporary name, synced, renamed. Every failing function here has said why
 * (naming the path) before it returns. */
#ifndef POE_SRC_FILES_H
#define POE_SRC_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

enum { POE_PATH_MAX = 4096 };

/* printf into a path buffer of POE_PATH_MAX; POE_BAD_INPUT when it does not fit. */
poe_status poe_path(char path[POE_PATH_MAX], const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Makes `path` and its parents as needed. POE_BAD_INPUT when it cannot be made or is not a directory. */
poe_status poe_make_directories(const char *path);

/* POE_BAD_INPUT unless files can be made in directory `path` (one is made and removed). `what` names the flag. */
poe_status poe_check_writable(const char *path, const char *what);

/* The whole file, NUL-terminated behind its `*size` bytes; the caller frees it. POE_BAD_INPUT when unreadable,
 * `what` naming the flag or kind of file. */
poe_status poe_read_file(const char *path, const char *what, char **data, size_t *size);

/* The whole of a regular file, mapped for reading: the caller unmaps it. POE_BAD_INPUT when unreadable, empty or no
 * regular file, `what` as above. */
poe_status poe_map_file(const char *path, const char *what, const char **data, size_t *size);

/* Writes `path` through `path`.tmp, synced and renamed; nothing is left behind on failure (POE_FAILED). */
poe_status poe_write_file(const char *path, const void *data, size_t size);

/* The last step of any such write: syncs the closed file `temporary`, renames it to `path` (on the same file system),
 * syncs the directory and forgets the temporary name. On failure the temporary file is gone (POE_FAILED). */
poe_status poe_replace_file(const char *temporary, const char *path);

/* Length and CRC-32C of a file, read back from the disk. POE_BAD_INPUT: cannot be opened; POE_FAILED: nor read. */
poe_status poe_checksum_file(const char *path, uint64_t *size, uint32_t *crc);

/* fsync of a file or directory by name. */
poe_status poe_sync_path(const char *path);

/* Removes a directory and all that is in it. A missing one is no failure. */
poe_status poe_remove_tree(const char *path);

/* Temporary paths that must not outlive a killed process: registered while they exist, by the one process that gives them
 * their final name. poe_temporary_remove_all() removes what is registered, files and directories, and is the last thing that
 * a process does before _exit, in whichever thread: others that come to one of these functions wait there for the end. So
 * nothing gets its final name that is being removed. */
void poe_temporary_register(const char *path);
void poe_temporary_forget(const char *path);
/* From now on this process and all that it forks have the same: who outlives the others can remove what they left. Before
 * any is registered. POE_FAILED: said. */
poe_status poe_temporary_share(void);
/* renameat2() with these flags. */
int poe_temporary_rename(const char *temporary, const char *final, unsigned flags);
void poe_temporary_remove_all(void);

#endif
