"""From files of dialogues to batches: demonstrations, chat text with loss masks, packed batches."""
