import time
from test_backpressure import Uploading, proxy_for, sockets, waiting, MIB
from test_backpressure import *
@pytest.mark.parametrize("reads", [True, False])
@pytest_twisted.ensureDeferred
async def test_zz(tmp_path: Path, reads):
    refusal = json_answer(413, {"error": {"message": "too long"}})
    script = [refusal] if reads else [StopReading(), refusal]
    async with ScriptedBackend(script, early=True) as backend, proxy_for(tmp_path, backend) as proxy:
        client = await proxy.open()
        up = Uploading(client, 64 * MIB)
        link=None
        for i in range(40):
            await deferLater(reactor, 0.1)
            if backend.requests: link = backend.requests[0].connection
            print(i, up.sent, client.received[:20], client.closed.called, link and (link.received, link.sent, link.closed), proxy.rows())
            if client.closed.called: break
        client.transport.abortConnection()
        for t in reactor.getReaders()+reactor.getWriters(): print(t)
