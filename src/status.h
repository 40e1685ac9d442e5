/* SPDX-License-Identifier: MIT
 * Result codes of every function that can fail. Zero is success; positive means that nothing has changed and the
 * caller may go on; negative means that something is lost, grouped by what: this request, a peer, the job.
 * The function that first knows the cause says it, once, with poe_error() (log.h); callers only pass the code up. */
#ifndef POE_SRC_STATUS_H
#define POE_SRC_STATUS_H

typedef enum poe_status {
    POE_OK = 0,
    POE_AGAIN = 1,        /* not now: try again later */
    POE_END = 2,          /* the data is used up */
    POE_BAD_INPUT = 3,    /* a flag, a file or an environment that cannot be used: exit status 2 */
    POE_FAILED = -1,      /* this request is lost (disk full, out of memory): exit status 1 */
    POE_NUMERIC = -2,     /* NaN or Inf where a number was expected: exit status 1 */
    POE_PEER_LOST = -3,   /* a rank is gone, silent past its deadline, or sends what nobody expects: exit status 1 */
    POE_INTERRUPTED = -4, /* the user asked us to stop: exit status 130 or 143 */
} poe_status;

/* The exit status that the process ends with for `status`; POE_INTERRUPTED gives 130. */
int poe_exit_status(poe_status status);

#endif
