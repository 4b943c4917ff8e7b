"""Why claims do not hold, or not clearly: written by hand, of the run that docs/claims.md shows."""

REASONS = {
    "1": "At equal steps transcription has come further: its WER is a fraction of continuation's. "
    "Each of its answers says every word of the sentence, in order, while a continuation says them "
    "in another order, among words that only follow from them. Slots that are near enough to words "
    "serve every task. Sentiment alone goes the other way: it is never said, but every "
    "continuation depends on it.",
    "2": "No adapter here overrides an instruction. The LLM was taught twelve tasks, each of which "
    "needs its instruction, and the adapter hears the speech alone: to make the LLM transcribe "
    "regardless, the slots would have to say so, and words do not.",
    "3": "Nothing collapses: the text's own states have a cosine of 0.19 under unlike tasks, those "
    "of continuation nearly the same, and those of ASR lie if anything further apart. Speech is as "
    "near to text under both.",
    "4": "ASR passes the encoder's own transcript: the adapter reads the encoder's states, not its "
    "letters, and the LLM knows every word of this small world, so that the misspellings that the "
    "cascade hands on do not arise.",
    "5": "At these steps continuation has not caught up with an encoder that is right on nearly "
    "every word. In the demo, with twice the batches, it is past the cascade on topic and "
    "sentiment, and still below on translation.",
    "8": "The sentences, voices and sounds of the three languages are unlike by design, and so are "
    "the encoder's states of them. An adapter that has heard one language maps its sounds to the "
    "words of that language's embeddings, and knows nothing of the others'.",
    "9": "Many answers of the behaviours are one to three words, so a step has fewer labels than "
    "T's, and each asks for less of the sentence: at equal steps MI has heard less. Nearly all of "
    "BLOOMZMMS's instructions were translation, as long as the sentence.",
    "10": "T + MI keeps MI's scores, but a quarter of its updates transcribe, and at equal steps "
    "it has not caught up with T, where all of them do.",
    "12": "Behaviours generalise to unseen wordings of their own tasks. To tasks that no one "
    "trained they carry over no better than continuations, whose answers need the whole sentence.",
    "14": "No wording costs either adapter much: an unseen wording is unseen to the adapter alone, "
    "and the LLM, which is frozen, was taught all of them.",
    "16": "Asked nothing, this LLM repeats the sentence: free response is transcription without an "
    "instruction here, and behaves like it. A chat LLM would answer.",
}

SPREAD = "The difference is small beside the seeds' spread; more seeds would tell."
