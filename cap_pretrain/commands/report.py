"""Make one HTML page of a run or of several side by side: curves, evaluations, examples, cost.

    cap report runs/quickstart --out page.html
    cap report runs/cap runs/clip --serve 8000

A run writes this page itself, as WORKDIR/report.html, at its evaluations. The page is one file and
loads nothing else. With --serve it is made anew for each request at http://127.0.0.1:PORT, which
only this machine reaches, and refreshes itself while a run goes on. Exit status: 0 done, 2 the
user's mistake.
"""

import argparse
import sys

from cap_pretrain import files, reports
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.reports import server


def _run(args: argparse.Namespace) -> int:
    if args.out is None and args.serve is None:
        raise UserError("give --out FILE.html, --serve PORT or both.")
    page = reports.render(args.runs)  # a wrong path is refused before anything is served
    if args.out:
        files.write_text(args.out, page)
        print(f"wrote {args.out}")
    if args.serve is not None:
        _serve(args)
    return 0


def _serve(args: argparse.Namespace) -> None:
    try:
        serving = server.server(lambda: reports.render(args.runs, live=server.PERIOD), args.serve)
    except OSError as error:
        raise UserError(f"--serve: port {args.serve}: {error.strerror}; choose another.") from error
    with serving:
        print(f"http://{server.HOST}:{serving.server_port} (Ctrl-C ends it)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=arguments.run_path,
        metavar="RUN",
        help="workdir of a run, a path or gs:// URL",
    )
    parser.add_argument("--out", type=arguments.run_path, help="output file, *.html")
    parser.add_argument("--serve", type=_port, metavar="PORT", help="port to serve at; 0: any")
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
