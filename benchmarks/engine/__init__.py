"""Shoal's speed beside its peers': `make bench-engine`.

`workloads`    what is asked, and the figure of it    `engines`     what can be measured
`protocol`     an engine's process, from inside       `child`       from outside
`shoal_alone`  the engine without its fleet           `shoal_fleet` a whole fleet
`..peers`       transformers, llama.cpp, OpenVINO     `f32_gguf`    the same weights for all, in float32
`figures`      rounds, interleaved                    `load`        what others took of the machine
`ratios`       what is asked of the figures           `step_parts`  where a step's time goes
`memory`       the memory's bandwidth                 `report`      the tables
"""
