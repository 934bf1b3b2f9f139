package grpcproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/spf13/cobra"

	"github.com/caddygrpc/caddy-grpc-proxy/inbound/route"
)

// routesCommand is grpc-proxy routes.
func routesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "routes [--config <path>] [--adapter <name>]",
		Short: "Tells which way calls take through a configuration",
		Long: `
Lists each grpc_proxy of a configuration with the hosts and paths that lead to
it, and the way its calls take: direct (past Caddy's HTTP server, with
grpc_relay), hop (through the server, behind grpc_relay) or handler (through the
server), and why not direct. It starts nothing.`,
		Args: cobra.NoArgs,
		RunE: caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
			if err := printRoutes(os.Stdout, fl.String("config"), fl.String("adapter")); err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			return caddy.ExitCodeSuccess, nil
		}),
	}
	cmd.Flags().StringP("config", "c", "", "Configuration file (default: Caddyfile, where there is one)")
	cmd.Flags().StringP("adapter", "a", "", "Name of the config adapter")
	return cmd
}

// printRoutes prints the ways of calls through a configuration.
func printRoutes(w io.Writer, file, adapter string) error {
	raw, name, _, err := caddycmd.LoadConfig(file, adapter)
	if err != nil {
		return err
	}
	if len(raw) == 0 {
		return errors.New("there is no configuration: name a file with --config")
	}
	var cfg *caddy.Config
	if err := caddy.StrictUnmarshalJSON(raw, &cfg); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	relayed, err := relayedServers(cfg.AppsRaw["http"])
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	ctx, err := caddy.ProvisionContext(cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	app, err := ctx.AppIfConfigured("http")
	if err != nil {
		return errors.New("the configuration has no HTTP server")
	}
	return writeRoutes(w, app.(*caddyhttp.App), relayed)
}

// relayedServers are the servers whose clients are read by grpc_relay.
func relayedServers(raw json.RawMessage) (map[string]bool, error) {
	var app struct {
		Servers map[string]struct {
			ListenerWrappers []struct {
				Wrapper string `json:"wrapper"`
			} `json:"listener_wrappers"`
		} `json:"servers"`
	}
	if len(raw) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(raw, &app); err != nil {
		return nil, err
	}
	relayed := make(map[string]bool)
	for name, srv := range app.Servers {
		for _, w := range srv.ListenerWrappers {
			relayed[name] = relayed[name] || w.Wrapper == "grpc_relay"
		}
	}
	return relayed, nil
}

// writeRoutes writes a line for each grpc_proxy.
func writeRoutes(w io.Writer, app *caddyhttp.App, relayed map[string]bool) error {
	tab := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tab, "SERVER\tLISTEN\tHOST\tPATH\tWAY\tWHY NOT DIRECT")
	for _, name := range slices.Sorted(maps.Keys(app.Servers)) {
		srv := app.Servers[name]
		for _, l := range route.New(srv, app.Metrics != nil).Lines() {
			way, why := "direct", ""
			switch {
			case !relayed[name]:
				way, why = "handler", "the server has no listener wrapper grpc_relay"
			case l.Handler == nil:
				way, why = "hop", l.Why
			}
			fmt.Fprintf(tab, "%s\t%s\t%s\t%s\t%s\t%s\n", name, strings.Join(srv.Listen, " "), list(l.Hosts), list(l.Paths), way, why)
		}
	}
	return tab.Flush()
}

func list(patterns []string) string {
	if len(patterns) == 0 {
		return "*"
	}
	return strings.Join(patterns, " ")
}
