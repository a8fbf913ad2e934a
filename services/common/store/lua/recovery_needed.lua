#!lua flags=no-writes
-- Returns this server's run id if the pool is not recovered in it, else nothing.
return recovering() and run_id()
