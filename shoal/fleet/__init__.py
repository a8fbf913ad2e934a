"""A whole fleet on one machine: what `shoal up` starts, watches and stops.

`options`     what was asked for               `ports`      addresses, chosen once
`plan`        the processes of a fleet         `command`    how a process is started, so that none is left behind
`kept`        one process, kept running        `supervisor` all of them, in order
`state_dir`   files of a fleet                 `running`    the fleet of a state directory, seen from outside
`detach`      a fleet in the background        `progress`   what a person sees while it starts
`model_file`  the model, looked into first      `foreign_redis` a Redis of the user's own, tried first
`spare`       workers that run while they are wanted
`kind`        what a process can be            `errors`     why something could not be done
`certificates` of `shoal up --tls`
`figures`     what its metrics say
"""
