"""What each command does with its options: parse, call one library function, show.

Imports stay inside the commands, so that --help answers at once.
"""
