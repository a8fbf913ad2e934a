"""The client library: `python examples/client.py HOST:PORT,HOST:PORT`. Kill one of the gateways: the answer goes on."""

import sys

import shoal

with shoal.Client(sys.argv[1]) as client:
    chat: list[shoal.Message] = [{"role": "user", "content": "Tell me a story about a lighthouse."}]
    print(f"{client.count_tokens(messages=chat)} prompt tokens")
    stream = client.generate(messages=chat, temperature=0.7, top_p=0.9, seed=1, max_tokens=128)
    for delta in stream:
        print(delta.text, end="", flush=True)
    print("\n", stream.finished)
    for decision in client.get_request(stream.request_id).decisions:
        print(f"{decision.at_ms:6} ms  {decision.what}  {decision.detail}")
