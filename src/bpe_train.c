/* SPDX-License-Identifier: MIT
 * Learns merges: counts the distinct pieces ("words") of the text, lays them out once, and then joins the most frequent
 * pair of neighbours again and again. Every pair knows where it occurs, so that a merge costs as much as it changes.
 * Ties go to the pair with the smaller left id, then the smaller right id. */
#include "src/tokenizer_private.h"

#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/min_heap.h"

enum { VOCAB_MAX = 65536, NO_TOKEN = -1 };

typedef struct word {
    size_t start; /* in `letters` */
    size_t length;
    uint64_t count;
    uint32_t same_hash; /* another word with this hash, or POE_NONE */
} word;

/* A token within a word. Words are fenced with places that hold NO_TOKEN, as do the places that were joined to their
 * left neighbours. */
typedef struct place {
    int32_t id;
    uint32_t previous, next;
    uint32_t word;
} place;

/* Where a pair starts, or started: lists are left as they are when a merge takes one of its tokens away. */
typedef struct occurrence {
    uint32_t place;
    uint32_t next; /* in ascending order of places; POE_NONE at the end */
} occurrence;

typedef struct pair {
    uint64_t key;
    uint64_t count;
    uint32_t first, last; /* occurrences */
} pair;

typedef struct trainer {
    char *letters; /* of all words */
    size_t n_letters, letters_capacity;
    word *words;
    size_t n_words, words_capacity;
    poe_pair_map word_index; /* hash -> word */
    place *places;
    occurrence *occurrences;
    uint32_t n_occurrences;
    pair *pairs;
    size_t n_pairs, pairs_capacity;
    poe_pair_map pair_index;
    poe_min_heap queue; /* (~count, key): most frequent first. Counts only fall, so a stale item comes up too early */
    poe_merge *merges;
    size_t n_merges;
} trainer;

static poe_status out_of_memory(void) {
    poe_error("out of memory for training the tokenizer");
    return POE_FAILED;
}

static void trainer_finish(trainer *t) {
    free(t->merges);
    free(t->queue.items);
    poe_pair_map_finish(&t->pair_index);
    free(t->pairs);
    free(t->occurrences);
    free(t->places);
    poe_pair_map_finish(&t->word_index);
    free(t->words);
    free(t->letters);
}

/* Makes room for `more` items behind the `used` ones of *items. */
static bool grow(void **items, size_t item_size, size_t used, size_t more, size_t *capacity) {
    if (more <= *capacity - used)
        return true;
    size_t larger = 2 * *capacity + more + 1024;
    void *p = realloc(*items, larger * item_size);
    if (!p)
        return false;
    *items = p;
    *capacity = larger;
    return true;
}

static poe_status count_word(trainer *t, const char *letters, size_t length) {
    uint64_t hash = poe_hash_bytes(POE_HASH_START, letters, length);
    uint32_t known = poe_pair_map_find(&t->word_index, hash), last = POE_NONE;
    for (uint32_t i = known; i != POE_NONE; last = i, i = t->words[i].same_hash)
        if (t->words[i].length == length && memcmp(t->letters + t->words[i].start, letters, length) == 0) {
            t->words[i].count++;
            return POE_OK;
        }
    if (!grow((void **)&t->letters, 1, t->n_letters, length, &t->letters_capacity) ||
        !grow((void **)&t->words, sizeof(word), t->n_words, 1, &t->words_capacity))
        return out_of_memory();
    uint32_t index = (uint32_t)t->n_words;
    if (last != POE_NONE)
        t->words[last].same_hash = index;
    else if (!poe_pair_map_add(&t->word_index, hash, index))
        return out_of_memory();
    memcpy(t->letters + t->n_letters, letters, length);
    t->words[t->n_words++] = (word){t->n_letters, length, 1, POE_NONE};
    t->n_letters += length;
    /* A place for each letter and each fence, three occurrences for each place: all numbered by 32 bits. */
    if (t->n_letters + t->n_words + 1 >= POE_NONE / 3) {
        poe_error("the text to train the tokenizer on has more than %u MiB of distinct words; give it less",
                  POE_NONE / 3 >> 20);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

static poe_status count_words(trainer *t, poe_text_source source, void *arg, poe_splitter *splitter) {
    const char *text, *piece;
    size_t bytes, length;
    poe_status status;
    for (size_t document = 1; (status = source(arg, &text, &bytes)) == POE_OK; document++) {
        poe_splitter_start(splitter, text, bytes);
        while ((status = poe_splitter_next(splitter, &piece, &length)) == POE_OK)
            if ((status = count_word(t, piece, length)) != POE_OK)
                return status;
        if (status == POE_BAD_INPUT)
            poe_error("document %zu of the text to train the tokenizer on is not UTF-8 at its byte %zu (from 0)",
                      document, length);
        if (status != POE_END)
            return status;
    }
    return status == POE_END ? POE_OK : status;
}

/* One more place where (left, right) occurs. */
static poe_status add_occurrence(trainer *t, int32_t left, int32_t right, uint32_t at) {
    uint64_t key = poe_pair_key((uint32_t)left, (uint32_t)right);
    uint32_t index = poe_pair_map_find(&t->pair_index, key);
    if (index == POE_NONE) {
        index = (uint32_t)t->n_pairs;
        if (!grow((void **)&t->pairs, sizeof(pair), t->n_pairs, 1, &t->pairs_capacity) ||
            !poe_pair_map_add(&t->pair_index, key, index))
            return out_of_memory();
        t->pairs[t->n_pairs++] = (pair){key, 0, POE_NONE, POE_NONE};
    }
    pair *p = &t->pairs[index];
    uint32_t occurrence_index = t->n_occurrences++;
    t->occurrences[occurrence_index] = (occurrence){at, POE_NONE};
    if (p->last == POE_NONE)
        p->first = occurrence_index;
    else
        t->occurrences[p->last].next = occurrence_index;
    p->last = occurrence_index;
    p->count += t->words[t->places[at].word].count;
    return POE_OK;
}

static void remove_occurrence(trainer *t, int32_t left, int32_t right, uint32_t at) {
    uint32_t index = poe_pair_map_find(&t->pair_index, poe_pair_key((uint32_t)left, (uint32_t)right));
    t->pairs[index].count -= t->words[t->places[at].word].count;
}

/* Queues the pairs from `first` on, which are new. An item returns to the queue only after it was taken out, so there
 * is never more than one for each pair. */
static poe_status queue_pairs(trainer *t, size_t first) {
    poe_heap_item *items = realloc(t->queue.items, (t->pairs_capacity + 1) * sizeof(*items));
    if (!items)
        return out_of_memory();
    t->queue.items = items;
    for (size_t i = first; i < t->n_pairs; i++)
        poe_heap_push(&t->queue, (poe_heap_item){~t->pairs[i].count, t->pairs[i].key});
    return POE_OK;
}

/* Lays out the words, with a fence before each and behind the last, and finds their pairs. */
static poe_status lay_out(trainer *t) {
    t->places = malloc((t->n_letters + t->n_words + 1) * sizeof(*t->places));
    /* One for each place at first, and two for each merge, which takes a place away. */
    t->occurrences = malloc(3 * (t->n_letters + 1) * sizeof(*t->occurrences));
    if (!t->places || !t->occurrences)
        return out_of_memory();
    uint32_t n = 0;
    t->places[n++].id = NO_TOKEN;
    for (uint32_t w = 0; w < t->n_words; w++) {
        for (size_t i = 0; i < t->words[w].length; i++, n++)
            t->places[n] = (place){(unsigned char)t->letters[t->words[w].start + i], n - 1, n + 1, w};
        t->places[n++].id = NO_TOKEN;
    }
    for (uint32_t i = 1; i + 1 < n; i++)
        if (t->places[i].id != NO_TOKEN && t->places[i + 1].id != NO_TOKEN) {
            poe_status status = add_occurrence(t, t->places[i].id, t->places[i + 1].id, i);
            if (status != POE_OK)
                return status;
        }
    return queue_pairs(t, 0);
}

/* Joins the pair of `merge` that starts at place `at`: its neighbours lose their pairs and get new ones. */
static poe_status join(trainer *t, const poe_merge *merge, uint32_t at) {
    place *places = t->places;
    uint32_t right = places[at].next, before = places[at].previous, after = places[right].next;
    poe_status status = POE_OK;
    if (places[before].id != NO_TOKEN)
        remove_occurrence(t, places[before].id, merge->left, at);
    if (places[after].id != NO_TOKEN)
        remove_occurrence(t, merge->right, places[after].id, at);
    remove_occurrence(t, merge->left, merge->right, at);
    places[at].id = merge->result;
    places[at].next = after;
    places[after].previous = at;
    places[right].id = NO_TOKEN;
    if (places[before].id != NO_TOKEN)
        status = add_occurrence(t, places[before].id, merge->result, before);
    if (places[after].id != NO_TOKEN && status == POE_OK)
        status = add_occurrence(t, merge->result, places[after].id, at);
    return status;
}

static poe_status apply_merge(trainer *t, const poe_merge *merge, uint32_t first_occurrence) {
    for (uint32_t i = first_occurrence; i != POE_NONE; i = t->occurrences[i].next) {
        uint32_t at = t->occurrences[i].place;
        if (t->places[at].id != merge->left || t->places[t->places[at].next].id != merge->right)
            continue;
        poe_status status = join(t, merge, at);
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}

static poe_status learn_merges(trainer *t, size_t wanted) {
    poe_status status = POE_OK;
    t->merges = malloc((wanted + 1) * sizeof(*t->merges));
    if (!t->merges)
        return out_of_memory();
    while (t->n_merges < wanted && t->queue.count && status == POE_OK) {
        poe_heap_item best = poe_heap_pop(&t->queue);
        pair p = t->pairs[poe_pair_map_find(&t->pair_index, best.minor)];
        if (p.count == 0)
            continue;
        if (p.count != ~best.major) {
            poe_heap_push(&t->queue, (poe_heap_item){~p.count, p.key});
            continue;
        }
        poe_merge *merge = &t->merges[t->n_merges];
        *merge = (poe_merge){(int32_t)(p.key >> 32), (int32_t)(uint32_t)p.key, 256 + (int32_t)t->n_merges};
        t->n_merges++;
        size_t first_new = t->n_pairs;
        status = apply_merge(t, merge, p.first);
        if (status == POE_OK)
            status = queue_pairs(t, first_new);
    }
    return status;
}

static poe_status set_joined(poe_tokenizer *tokenizer, const poe_merge *merge) {
    const poe_token *left = &tokenizer->tokens[merge->left], *right = &tokenizer->tokens[merge->right];
    char *bytes = malloc(left->length + right->length);
    if (!bytes)
        return out_of_memory();
    memcpy(bytes, left->bytes, left->length);
    memcpy(bytes + left->length, right->bytes, right->length);
    poe_status status = poe_tokenizer_set(tokenizer, merge->result, bytes, left->length + right->length, false);
    free(bytes);
    return status;
}

static poe_status make_tokenizer(const trainer *t, poe_tokenizer **tokenizer) {
    const char *owner = "the trained tokenizer";
    int n = 256 + (int)t->n_merges;
    poe_tokenizer *made;
    poe_status status = poe_tokenizer_create(poe_split_expression, n + POE_SPECIAL_TOKENS, t->n_merges, owner, &made);
    if (status != POE_OK)
        return status;
    for (int byte = 0; byte < 256 && status == POE_OK; byte++)
        status = poe_tokenizer_set(made, byte, (char[]){(char)byte}, 1, false);
    for (size_t i = 0; i < t->n_merges && status == POE_OK; i++) {
        made->merges[i] = t->merges[i];
        status = set_joined(made, &t->merges[i]);
    }
    for (int i = 0; i < POE_SPECIAL_TOKENS && status == POE_OK; i++)
        status = poe_tokenizer_set(made, n + i, poe_special_names[i], strlen(poe_special_names[i]), true);
    if (status == POE_OK)
        status = poe_tokenizer_complete(made, owner);
    if (status == POE_OK)
        *tokenizer = made;
    else
        poe_tokenizer_destroy(made);
    return status;
}

poe_status poe_tokenizer_train(poe_text_source source, void *arg, int vocab_size, poe_tokenizer **tokenizer) {
    if (vocab_size < POE_VOCAB_MIN || vocab_size > VOCAB_MAX) {
        poe_error("--vocab-size is %d; a tokenizer has %d to %d tokens", vocab_size, POE_VOCAB_MIN, VOCAB_MAX);
        return POE_BAD_INPUT;
    }
    trainer t = {0};
    poe_pattern *pattern = NULL;
    poe_splitter *splitter = NULL;
    poe_status status = poe_pattern_compile(poe_split_expression, "the tokenizer", &pattern);
    if (status == POE_OK)
        status = poe_splitter_create(pattern, &splitter);
    if (status == POE_OK)
        status = count_words(&t, source, arg, splitter);
    if (status == POE_OK)
        status = lay_out(&t);
    if (status == POE_OK)
        status = learn_merges(&t, (size_t)(vocab_size - POE_VOCAB_MIN));
    if (status == POE_OK)
        status = make_tokenizer(&t, tokenizer);
    poe_splitter_destroy(splitter);
    poe_pattern_destroy(pattern);
    trainer_finish(&t);
    return status;
}
