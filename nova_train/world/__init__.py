"""The embedded default world: procedurally generated, verifiable chat tasks. No download.

    tasks        questions with one right answer
    formats      answer formats and the requests for them
    cues         prompts that leave the format open, and what closes it
    prompts      questions as they are asked
    data         rows of every data set, disjoint by question
    reward       the checker and its reward functions: content and format of a response
    vocabulary, tokenizer, model      what the untrained model is made of

The stage that writes it all into a folder is nova_train.stages.world; docs/world.md tells what it measures.
"""
