// Command caddy is a full Caddy, all standard modules included, with the grpc_proxy plugin. It runs the user's own
// configuration like any Caddy (`caddy run`), and `caddy grpc-demo` shows the plugin at work with nothing to set up.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddygrpc/caddy-grpc-proxy"
)

func main() {
	caddycmd.Main()
}
