"""Reads the weights that other training programs leave, which are pickles, without loading a pickle.

A pickle is a program for a small machine that can call any function. Here its instructions are only decoded: what it
would import becomes a name, and what it would call becomes a `Made` with this name and its arguments. No class is
looked up and no function is called, so a hostile file has nothing to run.

    pickled    the instructions of a pickle as plain data
    archive    the files of torch.save: a pickle, and the bytes of its tensors, which are read from their places
    layouts    which files make a checkpoint of DeepSpeed, torch, Megatron and others, and what their weights are called
    worker     the process that reads all this, without network and with limits, and leaves safetensors
"""
