package grpcproxy

import (
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/healthcheck"
)

const healthNamespace = "http.grpc_proxy.health_checks"

// healthWords are the words about active health checks that were read so far. They may come in any order, so what they add
// up to is known only at the block's end.
type healthWords struct {
	kind   string // of health_check; empty if it is not there
	line   int
	active healthcheck.Active
	grpc   healthcheck.GRPC
	http   healthcheck.HTTP
	other  healthcheck.Prober // a check of somebody else's
	header http.Header

	any      string // some word but health_check
	grpcOnly string // some word that only grpc has
	httpOnly string // some word that only http has
}

func (p *parser) health() *healthcheck.Config {
	if p.h.HealthChecks == nil {
		p.h.HealthChecks = new(healthcheck.Config)
	}
	return p.h.HealthChecks
}

func (p *parser) passive() *healthcheck.Passive {
	c := p.health()
	if c.Passive == nil {
		c.Passive = new(healthcheck.Passive)
	}
	return c.Passive
}

// healthWord reads a word about health. known tells whether it is one.
func (p *parser) healthWord() (known bool, err error) {
	w := &p.words
	word := p.Val()
	switch word {
	case "health_check":
		return true, p.healthCheck()
	case "health_interval":
		err = p.duration(&w.active.Interval)
	case "health_timeout":
		err = p.duration(&w.active.Timeout)
	case "health_passes":
		err = p.integer(&w.active.Passes)
	case "health_fails":
		err = p.integer(&w.active.Fails)
	case "health_jitter":
		err = p.percentOrOff(&w.active.Jitter)
	case "health_fast_interval":
		err = p.duration(&w.active.FastInterval)
	case "health_unhealthy_interval":
		err = p.duration(&w.active.UnhealthyInterval)
	case "health_unhealthy_edge_interval":
		err = p.duration(&w.active.UnhealthyEdgeInterval)
	case "health_healthy_edge_interval":
		err = p.duration(&w.active.HealthyEdgeInterval)
	case "health_no_traffic_interval":
		err = p.duration(&w.active.NoTrafficInterval)
	case "health_end_hung_calls":
		err = p.flag(&w.active.EndHungCalls)
	case "health_authority":
		w.grpcOnly = word
		err = p.text(&w.grpc.Authority)
	case "health_version":
		w.httpOnly = word
		err = p.oneOf(&w.http.Version, "1.1", "2")
	case "health_port":
		err = p.healthPort()
	case "health_initial":
		err = p.oneOf(&w.active.Initial, healthcheck.InitialConnecting, healthcheck.InitialHealthy)
	case "health_headers":
		err = p.healthHeaders()
	case "health_mode":
		w.grpcOnly = word
		err = p.oneOf(&w.grpc.Mode, healthcheck.ModeAuto, healthcheck.ModeWatch, healthcheck.ModeCheck)
	case "health_services":
		w.grpcOnly = word
		err = p.healthServices()
	case "health_unimplemented":
		w.grpcOnly = word
		err = p.oneOf(&w.grpc.Unimplemented, healthcheck.UnimplementedHealthy, healthcheck.UnimplementedUnhealthy)
	case "health_uri":
		w.httpOnly = word
		err = p.text(&w.http.URI)
	case "health_method":
		w.httpOnly = word
		err = p.text(&w.http.Method)
	case "health_request_body":
		w.httpOnly = word
		err = p.text(&w.http.Body)
	case "health_body":
		w.httpOnly = word
		err = p.text(&w.http.ExpectBody)
	case "health_status":
		w.httpOnly = word
		err = p.healthStatus()
	case "health_follow_redirects":
		w.httpOnly = word
		err = p.flag(&w.http.FollowRedirects)
	case "health_path":
		return true, p.Errf("health_path is an old word of reverse_proxy's; write health_uri")
	case "health_upstream":
		return true, p.Errf("health_upstream: upstreams are asked where their calls go, or on health_port")
	default:
		return p.passiveWord()
	}
	w.any = word
	if err == nil {
		// The settings before this one were good, so what is wrong is wrong with this one.
		if bad := healthcheck.CheckWords(w.active, w.grpc, w.http); bad != nil {
			err = p.Errf("%s: %w", word, bad)
		}
	}
	return true, err
}

func (p *parser) healthCheck() error {
	w := &p.words
	if !p.NextArg() {
		return p.ArgErr()
	}
	w.kind, w.line = p.Val(), p.Line()
	switch w.kind {
	case "off":
		if p.NextArg() {
			return p.ArgErr()
		}
		return nil
	case "grpc", "http", "tcp":
		_, err := guest[healthcheck.Prober](p, healthNamespace, "health check")
		return err
	}
	var err error
	w.other, err = guest[healthcheck.Prober](p, healthNamespace, "health check")
	return err
}

func (p *parser) healthPort() error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(arg, 10, 16)
	if err != nil || n == 0 {
		return p.Errf("%s: %q is not a port, 1 to 65535", name, arg)
	}
	p.words.active.Port = int(n)
	return nil
}

func (p *parser) healthServices() error {
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	g := &p.words.grpc
	for _, arg := range args {
		switch {
		case arg == "per_rpc":
			return p.Errf("health_services: there is no per_rpc any more; list the services: health_services my.pkg.Service …")
		case slices.Contains(g.Services, arg):
			return p.Errf("health_services names %q twice", arg)
		default:
			g.Services = append(g.Services, arg)
		}
	}
	return nil
}

func (p *parser) healthHeaders() error {
	if p.NextArg() {
		return p.ArgErr()
	}
	w := &p.words
	if w.header == nil {
		w.header = make(http.Header)
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		key := p.Val()
		values := p.RemainingArgs()
		if len(values) == 0 {
			return p.Errf("health_headers: %s has no value", key)
		}
		w.header[http.CanonicalHeaderKey(key)] = append(w.header[http.CanonicalHeaderKey(key)], values...)
	}
	return nil
}

// healthStatus reads a status, or its class: 200 or 2xx.
func (p *parser) healthStatus() error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	if len(arg) == 3 && strings.HasSuffix(arg, "xx") {
		arg = arg[:1]
	}
	n, err := strconv.Atoi(arg)
	if err != nil || n <= 0 {
		return p.Errf("%s: %q is not an HTTP status; write 200 or 2xx, say", name, arg)
	}
	p.words.http.ExpectStatus = n
	return nil
}

// finishHealth turns the words into the configuration of an active check.
func (p *parser) finishHealth() error {
	w := &p.words
	if w.kind == "off" || w.kind == "" && w.any == "" {
		return nil
	}
	if w.httpOnly != "" && w.kind != "http" {
		return p.Errf("%s goes with `health_check http` only; without it, upstreams are asked by gRPC's own health service", w.httpOnly)
	}
	if w.grpcOnly != "" && w.kind != "" && w.kind != "grpc" {
		return p.Errf("%s goes with `health_check grpc` only, and this is `health_check %s`", w.grpcOnly, w.kind)
	}
	var check healthcheck.Prober
	switch w.kind {
	case "", "grpc":
		w.kind = "grpc"
		w.grpc.Headers = w.header
		check = &w.grpc
	case "http":
		w.http.Headers = w.header
		check = &w.http
	default:
		if w.header != nil {
			return p.Errf("health_headers goes with `health_check grpc` and `health_check http` only")
		}
		if check = w.other; w.kind == "tcp" {
			check = new(healthcheck.TCP)
		}
	}
	w.active.CheckRaw = caddyconfig.JSONModuleObject(check, "protocol", w.kind, nil)
	p.health().Active = &w.active
	return nil
}

// passiveWord reads a word about how health follows from calls.
func (p *parser) passiveWord() (known bool, err error) {
	switch p.Val() {
	case "fail_duration":
		return true, p.durationOrZero(&p.passive().FailDuration)
	case "max_fails":
		return true, p.integer(&p.passive().MaxFails)
	case "unhealthy_latency":
		return true, p.durationOrZero(&p.passive().UnhealthyLatency)
	case "unhealthy_request_count":
		return true, p.integer(&p.passive().UnhealthyRequestCount)
	case "deadline_failure_after":
		return true, p.duration(&p.passive().DeadlineFailureAfter)
	case "unhealthy_status":
		return true, p.unhealthyStatus()
	case "outlier_detection":
		return true, p.outlierDetection()
	case "slow_start":
		return true, p.slowStart()
	case "panic_threshold":
		return true, p.panicThreshold()
	}
	return false, nil
}

// unhealthyStatus reads gRPC codes; those of HTTP say nothing about gRPC.
func (p *parser) unhealthyStatus() error {
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	for _, arg := range args {
		switch c, err := grpcwire.ParseCode(arg); {
		case err != nil:
			return p.Errf("unhealthy_status: %q is no gRPC status; write UNAVAILABLE or INTERNAL, say (HTTP's statuses are 200 in gRPC, whatever happens)", arg)
		case c == grpcwire.OK:
			return p.Errf("unhealthy_status: %s is no failure; write UNAVAILABLE or INTERNAL, say", arg)
		}
		p.passive().FailureCodes = append(p.passive().FailureCodes, grpcwire.CodeText(arg))
	}
	return nil
}

func (p *parser) slowStart() error {
	c := p.health()
	c.SlowStart = new(healthcheck.SlowStart)
	if !p.NextArg() {
		return p.ArgErr()
	}
	window, err := caddy.ParseDuration(p.Val())
	if err != nil || window <= 0 {
		return p.Errf("slow_start: %q is not a positive duration; write 30s, say", p.Val())
	}
	c.SlowStart.Window = caddy.Duration(window)
	if p.NextArg() {
		return p.ArgErr()
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		switch p.Val() {
		case "aggression":
			err = p.number(&c.SlowStart.Aggression, "")
		case "min_weight_percent":
			err = p.number(&c.SlowStart.MinWeightPercent, "%")
		default:
			err = p.Errf("slow_start: unrecognized word %q; expected aggression or min_weight_percent", p.Val())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) panicThreshold() error { return p.number(&p.health().PanicThreshold, "%") }

// outlierDetection reads a block. The kinds of outliers that are not on by themselves are on as soon as they are named.
func (p *parser) outlierDetection() error {
	if p.NextArg() {
		return p.ArgErr()
	}
	pass := p.passive()
	if pass.OutlierDetection != nil {
		return p.twice("outlier_detection")
	}
	o := new(healthcheck.OutlierDetection)
	pass.OutlierDetection = o
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		var err error
		switch p.Val() {
		case "interval":
			err = p.duration(&o.Interval)
		case "base_ejection_time":
			err = p.duration(&o.BaseEjectionTime)
		case "max_ejection_time":
			err = p.duration(&o.MaxEjectionTime)
		case "max_ejection_time_jitter":
			err = p.duration(&o.MaxEjectionJitter)
		case "max_ejection_percent":
			err = p.percent(&o.MaxEjectionPercent)
		case "consecutive_failures":
			err = p.integerOrOff(&o.ConsecutiveFailures)
		case "consecutive_local_failures":
			err = p.integerOrOff(&o.ConsecutiveLocalFailures)
		case "ignore_health_checks":
			err = p.flag(&o.IgnoreChecks)
		case "success_rate":
			if o.SuccessRate == nil {
				o.SuccessRate = new(healthcheck.SuccessRate)
			}
			s := o.SuccessRate
			err = p.outliers(map[string]func() error{"stdev_factor": func() error { return p.integer(&s.StdevFactor) }},
				&s.MinimumHosts, &s.RequestVolume, &s.Enforcement)
		case "failure_percentage":
			if o.FailurePercentage == nil {
				o.FailurePercentage = new(healthcheck.FailurePercentage)
			}
			f := o.FailurePercentage
			err = p.outliers(map[string]func() error{"threshold": func() error { return p.percent(&f.Threshold) }},
				&f.MinimumHosts, &f.RequestVolume, &f.Enforcement)
		case "latency":
			if o.Latency == nil {
				o.Latency = new(healthcheck.Latency)
			}
			l := o.Latency
			err = p.outliers(map[string]func() error{
				"factor":             func() error { return p.number(&l.Factor, "") },
				"minimum_difference": func() error { return p.duration(&l.MinimumDifference) },
			}, &l.MinimumHosts, &l.RequestVolume, &l.Enforcement)
		default:
			err = p.Errf("outlier_detection: unrecognized word %q", p.Val())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// outliers reads the block of one kind of outliers: its own words and those that all kinds have.
func (p *parser) outliers(own map[string]func() error, hosts, volume, enforcement *int) error {
	kind := p.Val()
	if p.NextArg() {
		return p.ArgErr()
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		var err error
		switch word := p.Val(); word {
		case "minimum_hosts":
			err = p.integer(hosts)
		case "request_volume":
			err = p.integer(volume)
		case "enforcement_percentage":
			err = p.percent(enforcement)
		default:
			read, ok := own[word]
			if !ok {
				return p.Errf("outlier_detection %s: unrecognized word %q", kind, word)
			}
			err = read()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) oneOf(v *string, values ...string) error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	if !slices.Contains(values, arg) {
		return p.Errf("%s: %q is none of %s", name, arg, strings.Join(values, ", "))
	}
	*v = arg
	return nil
}

// number reads a positive number that may have the unit behind it.
func (p *parser) number(v *float64, unit string) error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	n, err := strconv.ParseFloat(strings.TrimSuffix(arg, unit), 64)
	if err != nil || !(n > 0) {
		return p.Errf("%s: %q is not a positive number", name, arg)
	}
	*v = n
	return nil
}
