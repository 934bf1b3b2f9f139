// Package orca reads the load that servers report of themselves: Open Request Cost Aggregation, as gRPC uses it (gRFC
// A51). A report comes with the trailers of a call (in-band), or on a stream that is asked for (out-of-band, [Stream]).
package orca

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Load is what a report says, as far as weights are made of it (gRFC A58).
type Load struct {
	// Utilization is how much of the server is in use, 1 being all of it, from the metric that was asked for.
	Utilization float64
	// QPS and EPS are the queries and the errors per second, all clients' together.
	QPS, EPS float64
}

// The fields of xds.data.orca.v3.OrcaLoadReport that are looked at. The maps are repeated messages of a key (1) and a
// value (2).
const (
	fieldCPU          protowire.Number = 1 // double cpu_utilization
	fieldMem          protowire.Number = 2 // double mem_utilization
	fieldUtilization  protowire.Number = 5 // map<string, double> utilization
	fieldQPS          protowire.Number = 6 // double rps_fractional
	fieldEPS          protowire.Number = 7 // double eps
	fieldNamedMetrics protowire.Number = 8 // map<string, double> named_metrics
	fieldApplication  protowire.Number = 9 // double application_utilization
)

// maxNames bounds Metrics, so that reading a report needs no memory.
const maxNames = 16

// Metrics says what Load.Utilization is made of. The zero value is gRFC A58: application_utilization, else
// cpu_utilization.
type Metrics struct {
	names [maxNames]metric
	n     int
}

type metric struct {
	field protowire.Number
	key   string // of a map
}

// NewMetrics makes Metrics that take the highest of the named metrics if application_utilization is not reported, and
// cpu_utilization only if none of them is either (gRFC A114). Besides those of A114, utilization.<key> is a name, as in
// Envoy: it is where grpc-go's SetNamedUtilization puts its values.
func NewMetrics(names []string) (m Metrics, err error) {
	if len(names) > maxNames {
		return m, fmt.Errorf("%d names are too many, the most is %d", len(names), maxNames)
	}
	for i, name := range names {
		if slices.Contains(names[:i], name) {
			return m, fmt.Errorf("%q is given twice", name)
		}
		// A114: "split_on_first_dot(metric_name)".
		field, key, isMap := strings.Cut(name, ".")
		var number protowire.Number
		switch {
		case !isMap && field == "cpu_utilization":
			number = fieldCPU
		case !isMap && field == "mem_utilization":
			number = fieldMem
		case !isMap && field == "application_utilization":
			number = fieldApplication
		case isMap && field == "utilization" && key != "":
			number = fieldUtilization
		case isMap && field == "named_metrics" && key != "":
			number = fieldNamedMetrics
		default:
			return m, fmt.Errorf("%q is not the name of a utilization; write cpu_utilization, mem_utilization, "+
				"application_utilization, utilization.<key> or named_metrics.<key>", name)
		}
		m.names[m.n] = metric{number, key}
		m.n++
	}
	return m, nil
}

// Read reads a report, an xds.data.orca.v3.OrcaLoadReport in wire format. It allocates nothing.
func (m *Metrics) Read(report []byte) (Load, error) {
	var (
		l                Load
		cpu, application float64
		values           [maxNames]float64
	)
	for b := report; len(b) > 0; {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return Load{}, errMalformed
		}
		b = b[n:]
		switch {
		case kind == protowire.Fixed64Type:
			bits, n := protowire.ConsumeFixed64(b)
			if n < 0 {
				return Load{}, errMalformed
			}
			b = b[n:]
			x := math.Float64frombits(bits)
			switch field {
			case fieldCPU:
				cpu = x
			case fieldApplication:
				application = x
			case fieldQPS:
				l.QPS = x
			case fieldEPS:
				l.EPS = x
			default:
			}
			m.note(&values, field, nil, x)
		case kind == protowire.BytesType:
			entry, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return Load{}, errMalformed
			}
			b = b[n:]
			if field != fieldUtilization && field != fieldNamedMetrics {
				continue
			}
			key, x, err := readEntry(entry)
			if err != nil {
				return Load{}, err
			}
			m.note(&values, field, key, x)
		default:
			n := protowire.ConsumeFieldValue(field, kind, b)
			if n < 0 {
				return Load{}, errMalformed
			}
			b = b[n:]
		}
	}
	switch {
	case application > 0:
		l.Utilization = application
	default:
		for _, x := range values[:m.n] {
			// A114: "Track the maximum value among all successfully resolved, positive ( > 0), finite metrics."
			if x > l.Utilization && x <= math.MaxFloat64 {
				l.Utilization = x
			}
		}
		if l.Utilization == 0 {
			l.Utilization = cpu
		}
	}
	return l, nil
}

// note keeps the value if its name was asked for. What comes later in a message replaces what came before.
func (m *Metrics) note(values *[maxNames]float64, field protowire.Number, key []byte, x float64) {
	for i := range m.names[:m.n] {
		if w := &m.names[i]; w.field == field && w.key == string(key) {
			values[i] = x
		}
	}
}

// readEntry reads an entry of a map<string, double>.
func readEntry(b []byte) (key []byte, value float64, err error) {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, 0, errMalformed
		}
		b = b[n:]
		switch {
		case field == 1 && kind == protowire.BytesType:
			key, n = protowire.ConsumeBytes(b)
		case field == 2 && kind == protowire.Fixed64Type:
			var bits uint64
			bits, n = protowire.ConsumeFixed64(b)
			value = math.Float64frombits(bits)
		default:
			n = protowire.ConsumeFieldValue(field, kind, b)
		}
		if n < 0 {
			return nil, 0, errMalformed
		}
		b = b[n:]
	}
	return key, value, nil
}

// errMalformed is made once: reading must not allocate.
var errMalformed = errors.New("malformed load report")
