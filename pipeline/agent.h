/* SPDX-License-Identifier: MIT
 * A rank's agent: keeps the rank's connections (comm/agent/relay.h) and looks after its stage process, which it has the
 * keeper start, and start again when it dies, gives no sign of life, or does not come forward. The other ranks notice
 * no more than a pause. */
#ifndef POE_PIPELINE_AGENT_H
#define POE_PIPELINE_AGENT_H

#include "comm/agent/relay.h"
#include "pipeline/keeper.h"

typedef struct poe_agent_settings {
    double deadline; /* seconds after which other ranks give up a silent one, as poe_comm_settings has it; 0: 120 */
    bool continues; /* when the stage dies again and again, the run goes on without it (pipeline/outage.h) */
    bool skips;      /* a stage process that goes on does not repeat what its predecessor did */
    void (*attend)(void *context); /* called after every wake-up; NULL: nothing is */
    void *context;
    double arriving; /* when a stage that has come from elsewhere began to leave there, by poe_now(); 0: none has come */
} poe_agent_settings;

/* Starts the stage process, which goes on from the board's valid snapshot if there is one, and returns its outcome (board->outcome); all are borrowed. After POE_OK, POE_BAD_INPUT and
 * POE_INTERRUPTED what it has sent is delivered. Otherwise the job cannot go on, and the reason is said: by the stage
 * process, or here, when it, or the keeper, has died and nothing can be done. */
poe_status poe_agent_run(poe_board *board, poe_keeper *keeper, poe_relay *relay, const poe_agent_settings *settings);

#endif
