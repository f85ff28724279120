"""The commands, a module each: parse, compose, call, echo. No numerics live here."""
