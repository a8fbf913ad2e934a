import asyncio, json, sys, time, psutil, pytest
from services.common import rpc
from gen.shoal.fleet.v1 import delivery_pb2
from tests.contract.gateway_fleet import *
from tests.contract.test_gateway_process import started_gateway, fleet, _nothing
from services.common.record.states import RequestState

async def xtest_flood(fleet):
    process, a = await sg(fleet,"--log-level","INFO")
    for n,ch in ((2000,8),(2000,8)):
        p=await asyncio.create_subprocess_exec(sys.executable,"/tmp/flood.py",a["address"],str(n),str(ch))
        await p.wait()
        print("rss", psutil.Process(process.pid).memory_info().rss/1e6, psutil.Process(process.pid).cpu_times())
        await asyncio.sleep(1)
    process.terminate(); await process.wait()

async def test_rate(fleet):
    process, a = await started_gateway(fleet)
    async with rpc.channel(a["address"]) as channel:
        gw=RunningGateway(a["address"],a["fleet_address"],asyncio.Event(),asyncio.ensure_future(_nothing()),channel)
        N=int(__import__('os').environ.get('N','64'))
        answers=[gw.generate(request_id=f"r{i}",max_tokens=1900) for i in range(N)]
        await asyncio.gather(*(x.accepted() for x in answers))
        w=await fleet.link(gw)
        keys=[fleet.key(f"r{i}") for i in range(N)]
        atts=[await fleet.place(k) for k in keys]
        for k,t in zip(keys,atts): await w.open(k,t)
        p=psutil.Process(process.pid); c0=p.cpu_times(); t0=time.perf_counter()
        STEPS=100
        msgs=[delivery_pb2.DeliverRequest(frames=[frame(k,t,s,"x") for k,t in zip(keys,atts)]) for s in range(STEPS)]
        async def send():
            for m in msgs:
                await w.call.write(m)
                await asyncio.sleep(0.05)
        async def read(x):
            await x.until_text("x"*STEPS)
        t0=time.perf_counter(); c0=p.cpu_times()
        await asyncio.gather(send(),*(read(x) for x in answers))
        c1=p.cpu_times(); dt=time.perf_counter()-t0
        cpu=c1.user+c1.system-c0.user-c0.system
        nd=sum(x.num_deltas for x in answers)
        print("deltas",nd,"wall",dt,"cpu",cpu,"us/delta sent",cpu/nd*1e6,"us/token",cpu/(N*STEPS)*1e6, "rss",p.memory_info().rss/1e6)
    process.terminate(); await process.wait()

async def sg(fleet, *flags):
    process = await asyncio.create_subprocess_exec(sys.executable,"-m", "services.gateway", "--redis-url", fleet.url, "--pool", fleet.pool,"--tokenizers", fleet.tokenizer_address,*flags,cwd="/work/main",stdout=asyncio.subprocess.PIPE,stderr=open("/tmp/gw.log","w"))
    return process, json.loads(await process.stdout.readline())
