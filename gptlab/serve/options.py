"""The options of the door `serve`."""

from gptlab.options import Options

KEY = "GPTLAB_API_KEY"
MORE = f"""\
Then point any client of OpenAI's at http://127.0.0.1:8000/v1, or a browser at http://127.0.0.1:8000.
Whoever can reach a server may use it: beside the loopback address, a key in {KEY} is required."""


def serve() -> Options:
    options = Options("serve", "Answer OpenAI's API with a trained model, and offer a chat page.", MORE)
    options.add_run()
    add = options.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one, and says which (8000)")
    add("--api-key", metavar="KEY", help=f"that clients must give; better in {KEY}, which others cannot see")
    add("--name", metavar="NAME", help="what the model is called (the name of the run's folder)")
    add("--parallel", type=int, default=8, metavar="N", help="samples that are generated at a time (8)")
    add("--queue", type=int, default=32, metavar="N", help="that wait besides, before 429 is answered (32)")
    add("--max-tokens", type=int, default=4096, metavar="N", help="of one answer, at most (4096)")
    add("--max-body-kb", type=int, default=2048, metavar="N", help="of a request, at most (2048)")
    add("--timeout", type=float, default=600, metavar="S", help="seconds for a request, waiting included (600)")
    options.add_decoding()
    return options
