"""A teacher whose body is on a vLLM server and whose output head is here: the whole distribution, from any size.

server.py is the teacher, states.py asks for hidden states and checks them, head.py reads a checkpoint's head alone.
"""
